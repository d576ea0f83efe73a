/// From a question to ids with one placeholder for each visual token, and when to stop.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"
#include "tokenizer.h"

namespace skipvision {

/// Prompts of one bundle, equal to those of skipvision_export/runtime/prompt.py.
class PromptBuilder {
 public:
  /// Throws Error where the tokenizer has no placeholder.
  PromptBuilder(const Manifest& manifest, const Tokenizer& tokenizer);
  /// `layout.total()` placeholders stand for the picture; throws Error for a prompt that is empty
  /// or has more or less than one place for it.
  std::vector<std::int64_t> operator()(std::string_view question) const;

 private:
  const Manifest& manifest_;
  const Tokenizer& tokenizer_;
  std::string placeholder_;
};

/// End tokens: generation_config.json's, else config.json's, else the tokenizer's.
std::vector<std::int64_t> end_tokens(const std::filesystem::path& folder,
                                     const Tokenizer& tokenizer);

}  // namespace skipvision
