"""TensorRT engines of a bundle: finding a compiler, recipes, profiles, lowering, building."""
