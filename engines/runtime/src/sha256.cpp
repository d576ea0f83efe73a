#include "sha256.h"

#include <array>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

constexpr std::array<std::uint32_t, 64> kRounds = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using State = std::array<std::uint32_t, 8>;

constexpr std::uint32_t rotate(std::uint32_t x, int n) { return x >> n | x << (32 - n); }

void absorb(State& state, const std::uint8_t* block) {
  std::array<std::uint32_t, 64> w{};
  for (int i = 0; i < 16; ++i)
    w[i] = std::uint32_t{block[4 * i]} << 24 | std::uint32_t{block[4 * i + 1]} << 16 |
           std::uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    std::uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
    std::uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + a + w[i - 7] + b;
  }
  State s = state;
  for (int i = 0; i < 64; ++i) {
    std::uint32_t mix = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
    std::uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
    std::uint32_t first = s[7] + mix + choice + kRounds[i] + w[i];
    std::uint32_t turn = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
    std::uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
    s = {first + turn + majority, s[0], s[1], s[2], s[3] + first, s[4], s[5], s[6]};
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

std::string digest_of(std::istream& stream, const std::string& name) {
  State state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::vector<std::uint8_t> buffer(1 << 20);
  std::uint64_t total = 0;
  bool last = false;
  while (!last) {
    stream.read(reinterpret_cast<char*>(buffer.data()), 1 << 20);
    std::size_t size = static_cast<std::size_t>(stream.gcount());
    if (stream.bad()) throw Error(name + " cannot be read");
    total += size;
    last = size < (1 << 20);
    if (last) {
      buffer.resize(size);
      buffer.push_back(0x80);
      buffer.resize((buffer.size() + 8 + 63) / 64 * 64);
      for (int i = 0; i < 8; ++i)
        buffer[buffer.size() - 1 - i] = static_cast<std::uint8_t>(total * 8 >> 8 * i);
      size = buffer.size();
    }
    for (std::size_t at = 0; at < size; at += 64) absorb(state, buffer.data() + at);
  }
  static constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (std::uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) text += digits[word >> shift & 15];
  return text;
}

}  // namespace

std::string sha256_of(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Error(file.string() + " cannot be read");
  return digest_of(stream, file.string());
}

std::string sha256_of_text(const std::string& text) {
  std::istringstream stream(text);
  return digest_of(stream, "text");
}

}  // namespace skipvision
