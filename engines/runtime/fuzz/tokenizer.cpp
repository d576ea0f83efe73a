/// tokenizer.json up to the first zero byte, and a prompt behind it; then its ids back to text.
#include "tokenizer.h"

#include "skipvision/skipvision.h"
#include "utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  auto end = text.find('\0');
  std::string prompt = end == std::string::npos ? "a prompt <s> 12" : text.substr(end + 1);
  try {
    skipvision::Tokenizer tokenizer(skipvision::Document(text.substr(0, end), "fuzz", "again"));
    skipvision::Detokenizer detokenizer(tokenizer);
    std::string all;
    for (std::int64_t id : tokenizer.encode(prompt)) all += detokenizer.push(id);
    all += detokenizer.finish();
    if (!skipvision::is_utf8(all)) __builtin_trap();
  } catch (const skipvision::Error&) {
  }
  return 0;
}
