#pragma once

#include <filesystem>
#include <string>

namespace skipvision {

/// SHA-256 (FIPS 180-4) of a file, as 64 lower-case hexadecimal digits; throws Error.
std::string sha256_of(const std::filesystem::path& file);
/// Of text that is at hand.
std::string sha256_of_text(const std::string& text);

}  // namespace skipvision
