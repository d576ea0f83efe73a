#pragma once

#include "skipvision/skipvision.h"

namespace skipvision {

/// Pillow's `Image.resize(size, BICUBIC)` of 8-bit RGB, to the bit: separable, the support scaled
/// when it shrinks, weights in 22-bit fixed point, rounded to 8 bits between the two passes, whose
/// order is that of Pillow 13 (before it, the width always came first).
/// Source: Pillow, src/libImaging/Resample.c.
Picture resize_bicubic(const Picture& picture, int width, int height);

}  // namespace skipvision
