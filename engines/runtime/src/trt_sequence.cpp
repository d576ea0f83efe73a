#include "trt_sequence.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

// Positions of the cache are a multiple of it where graphs are used: each change is a copy of the
// cache and a new graph.
constexpr std::int64_t kRoom = 128;

class TrtSequence : public Sequence {
 public:
  TrtSequence(TrtPrefilled prefilled, bool cuda_graphs)
      : hold_(std::move(prefilled.lane)),
        lane_(*hold_),
        device_(cuda::DeviceScope::current()),
        image_features_(std::move(prefilled.image_features)),
        keeps_room_(cuda_graphs),
        length_(prefilled.length),
        pitch_(prefilled.length) {
    guarded([&] {
      const EngineInfo& info = lane_.prefill.info();
      lane_.scores.fetch(lane_.prompt_logits, prefilled.logits, info.dtype("logits"), lane_.stream);
      lane_.stream.wait();
      lane_.scores.read(logits_);
      std::swap(lane_.past, lane_.present);
    });
  }

  const std::vector<float>& logits() const override { return logits_; }
  std::int64_t length() const override { return length_; }

  void step(std::int64_t token, std::int64_t position) override {
    cuda::DeviceScope scope(device_);
    guarded([&] {
      if (keeps_room_ && length_ == pitch_) make_room();
      bind();
      write_inputs(token, position);
      run();
      keep_new();
      lane_.stream.wait();
      lane_.scores.read(logits_);
    });
  }

 private:
  /// After an error nobody knows what the lane's memory and contexts hold.
  template <typename Call>
  void guarded(Call call) {
    try {
      call();
    } catch (...) {
      lane_.healthy = false;
      throw;
    }
  }

  /// [1, heads, positions, head size] of K or V `i`.
  Sizes cache_sizes(std::size_t i, std::int64_t positions) const {
    const SizeRange& range = lane_.decode.info().profiles[0].at(lane_.cache[i].past);
    return {1, range.high.at(1), positions, range.high.at(3)};
  }

  std::size_t row_bytes(std::size_t i) const {
    return static_cast<std::size_t>(cache_sizes(i, 1)[3]) *
           bytes_of(lane_.decode.info().dtype(lane_.cache[i].past));
  }

  /// Copies `rows` positions of each head; the pitches are the positions from one head to the next.
  void copy_rows(std::size_t i, std::byte* to, std::int64_t to_pitch, const std::byte* from,
                 std::int64_t from_pitch, std::int64_t rows) {
    std::size_t row = row_bytes(i);
    Sizes sizes = cache_sizes(i, 1);
    cuda::check(cudaMemcpy2DAsync(to, row * to_pitch, from, row * from_pitch, row * rows,
                                  static_cast<std::size_t>(sizes[0] * sizes[1]),
                                  cudaMemcpyDeviceToDevice, lane_.stream),
                "copy of the cache");
  }

  /// Inputs of decode whose shapes depend on the cache's positions.
  std::map<std::string, Sizes> past_sizes(std::int64_t positions) const {
    std::map<std::string, Sizes> sizes{{"attention_mask", {1, positions + 1}}};
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      sizes[lane_.cache[i].past] = cache_sizes(i, positions);
    return sizes;
  }

  /// Moves the cache to buffers with free positions, zeroed: masked ones must not be NaN. Where no
  /// profile has room for that, it stays, and decode goes on with shapes that grow.
  void make_room() {
    const EngineInfo& info = lane_.decode.info();
    std::int64_t pitch = std::min((length_ / kRoom + 1) * kRoom, info.largest(lane_.cache[0].past, 2));
    if (pitch <= length_ || info.find_profile(past_sizes(pitch)) < 0) return;
    for (std::size_t i = 0; i < lane_.cache.size(); ++i) {
      std::size_t bytes = count_of(cache_sizes(i, pitch)) * row_bytes(i) / cache_sizes(i, 1)[3];
      lane_.present[i].reserve(bytes);
      cuda::check(cudaMemsetAsync(lane_.present[i].data(), 0, bytes, lane_.stream), "cudaMemset");
      copy_rows(i, lane_.present[i].data(), pitch, lane_.past[i].data(), pitch_, length_);
    }
    lane_.stream.wait();  // buffers are moved next
    std::swap(lane_.past, lane_.present);
    pitch_ = pitch;
  }

  /// Sets shapes and places of the decode contexts, unless they are as the last step left them.
  void bind() {
    const EngineInfo& embed = lane_.embed_token.info();
    const EngineInfo& decode = lane_.decode.info();
    std::int64_t total = pitch_ + 1;
    inputs_ = lane_.token.lay_out(
        {{{"input_ids", embed.dtype("input_ids")}, {1, 1}},
         {{"image_features", embed.dtype("image_features")}, image_features_},
         {{"position_ids", decode.dtype("position_ids")}, {1, 1}},
         {{"attention_mask", decode.dtype("attention_mask")}, {1, total}}});
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      lane_.present[i].reserve(count_of(cache_sizes(i, total)) * row_bytes(i) /
                               cache_sizes(i, 1)[3]);
    std::vector<const void*> wanted{inputs_.back().device,
                                    reinterpret_cast<const void*>(pitch_)};
    for (const auto* buffers : {&lane_.past, &lane_.present})
      for (const cuda::Buffer& buffer : *buffers) wanted.push_back(buffer.data());
    if (wanted == lane_.bound) return;
    lane_.graph.reset();
    lane_.runs = 0;
    lane_.bound.clear();
    lane_.embed_token.set_inputs({inputs_[0], inputs_[1]}, lane_.stream);
    Sizes embeds = lane_.embed_token.set_output("inputs_embeds", lane_.token_embeds);
    std::vector<TrtInput> all{{"inputs_embeds", embeds, lane_.token_embeds.data(), nullptr},
                              inputs_[2],
                              inputs_[3]};
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      all.push_back(
          {lane_.cache[i].past, cache_sizes(i, pitch_), lane_.past[i].data(), nullptr});
    lane_.decode.set_inputs(all, lane_.stream);
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      lane_.decode.set_output(lane_.cache[i].present, lane_.present[i]);
    logits_sizes_ = lane_.decode.set_output("logits", lane_.logits);
    lane_.bound = std::move(wanted);
  }

  void write_inputs(std::int64_t token, std::int64_t position) {
    auto* mask = static_cast<std::int64_t*>(inputs_[3].host);
    *static_cast<std::int64_t*>(inputs_[0].host) = token;
    *static_cast<std::int64_t*>(inputs_[2].host) = position;
    // The new token comes behind the free positions.
    std::fill_n(mask, length_, 1);
    std::fill(mask + length_, mask + pitch_, 0);
    mask[pitch_] = 1;
  }

  /// Everything of a step but what moves with the cache's length.
  bool launch() {
    lane_.token.send(lane_.stream);
    if (!lane_.embed_token.try_enqueue(lane_.stream)) return false;
    if (!lane_.decode.try_enqueue(lane_.stream)) return false;
    lane_.scores.fetch(lane_.logits, lane_.decode.output_sizes("logits"),
                       lane_.decode.info().dtype("logits"), lane_.stream);
    return true;
  }

  void run() {
    // The first run after shapes changed is TensorRT's to settle; what follows can be captured.
    bool try_graph = keeps_room_ && lane_.can_capture && lane_.runs == 1 && !lane_.graph;
    if (try_graph && !lane_.graph.capture(lane_.stream, [&] { return launch(); })) {
      lane_.graph.reset();
      lane_.can_capture = false;
    }
    if (lane_.graph)
      lane_.graph.launch(lane_.stream);
    else if (!launch())
      throw Error("decoder_decode: the engine does not run");
    ++lane_.runs;
  }

  /// The new token's K/V from behind the free positions to the first of them; where there are none,
  /// what decode wrote is the cache as it must be.
  void keep_new() {
    if (length_ < pitch_) {
      for (std::size_t i = 0; i < lane_.cache.size(); ++i) {
        std::size_t row = row_bytes(i);
        copy_rows(i, lane_.past[i].data() + row * length_, pitch_,
                  lane_.present[i].data() + row * pitch_, pitch_ + 1, 1);
      }
    } else {
      std::swap(lane_.past, lane_.present);
      ++pitch_;
    }
    ++length_;
  }

  LaneHold hold_;
  Lane& lane_;
  int device_;
  Sizes image_features_;
  bool keeps_room_;
  std::int64_t length_;  // cached positions
  std::int64_t pitch_;   // positions of `past`, free ones included
  std::vector<TrtInput> inputs_;
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Sequence> make_sequence(TrtPrefilled prefilled, bool cuda_graphs) {
  return std::make_unique<TrtSequence>(std::move(prefilled), cuda_graphs);
}

}  // namespace skipvision
