#include "trt_sequence.h"

#include <algorithm>
#include <map>
#include <utility>

#include "skipvision/skipvision.h"
#include "stopwatch.h"

namespace skipvision {
namespace {

// Positions of a cache with room are a multiple of it; more of them cost a copy of the cache and a
// new graph.
constexpr std::int64_t kRoom = 128;

class TrtSequence : public Sequence {
 public:
  TrtSequence(TrtPrefilled prefilled, bool cuda_graphs)
      : hold_(std::move(prefilled.lane)),
        lane_(*hold_),
        device_(cuda::DeviceScope::current()),
        padding_(std::move(prefilled.padding)),
        image_features_(std::move(prefilled.image_features)),
        keeps_room_(cuda_graphs),
        length_(prefilled.kept),
        pitch_(prefilled.kept) {
    lane_.scores.fetch(lane_.prompt_logits, prefilled.logits, lane_.prefill.info().dtype("logits"),
                       lane_.stream);
    lane_.stream.wait();
    std::swap(lane_.past, lane_.present);
    hold_->healthy = true;
  }

  Logits logits(std::size_t row) const override { return lane_.scores.read(row, converted_); }
  std::int64_t length(std::size_t row) const override { return length_ - padding_[row]; }
  double graph_ms() const override { return graph_ms_; }

  void step(const std::vector<std::int64_t>& tokens,
            const std::vector<std::int64_t>& positions) override {
    cuda::DeviceScope scope(device_);
    // After an error nobody knows what the lane's memory and contexts hold.
    lane_.healthy = false;
    if (keeps_room_ && length_ == pitch_) make_room();
    bind();
    write_inputs(tokens, positions);
    Stopwatch watch;
    run();
    keep_new();
    lane_.stream.wait();
    graph_ms_ = watch.lap();
    lane_.healthy = true;
  }

 private:
  std::int64_t rows() const { return static_cast<std::int64_t>(padding_.size()); }

  /// [rows, heads, positions, head size] of K or V `i`.
  Sizes cache_sizes(std::size_t i, std::int64_t positions) const {
    const Sizes& largest = lane_.decode.info().profiles[0].at(lane_.cache[i].past).high;
    return {rows(), largest.at(1), positions, largest.at(3)};
  }

  /// Bytes of one position of one head.
  std::size_t position_bytes(std::size_t i) const {
    return static_cast<std::size_t>(cache_sizes(i, 1)[3]) *
           bytes_of(lane_.decode.info().dtype(lane_.cache[i].past));
  }

  std::size_t heads(std::size_t i) const {
    return static_cast<std::size_t>(rows() * cache_sizes(i, 1)[1]);
  }

  /// Copies `count` positions of each head; from one head to the next are `pitch` positions.
  void copy(std::size_t i, std::byte* to, std::int64_t to_pitch, const std::byte* from,
            std::int64_t from_pitch, std::int64_t count) {
    std::size_t bytes = position_bytes(i);
    cuda::check(cudaMemcpy2DAsync(to, bytes * to_pitch, from, bytes * from_pitch, bytes * count,
                                  heads(i), cudaMemcpyDeviceToDevice, lane_.stream),
                "copy of the cache");
  }

  /// Moves the cache to buffers with free positions, zeroed: masked ones must not be NaN. Where no
  /// profile has room for that it stays, and decode goes on with shapes that grow.
  void make_room() {
    const EngineInfo& info = lane_.decode.info();
    std::int64_t most = info.largest(lane_.cache[0].past, 2);
    std::int64_t pitch = std::min((length_ / kRoom + 1) * kRoom, most);
    std::map<std::string, Sizes> shapes{{"attention_mask", {rows(), pitch + 1}}};
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      shapes[lane_.cache[i].past] = cache_sizes(i, pitch);
    if (pitch <= length_ || info.find_profile(shapes) < 0) return;
    for (std::size_t i = 0; i < lane_.cache.size(); ++i) {
      std::size_t bytes = heads(i) * pitch * position_bytes(i);
      lane_.present[i].reserve(bytes);
      cuda::check(cudaMemsetAsync(lane_.present[i].data(), 0, bytes, lane_.stream), "cudaMemset");
      copy(i, lane_.present[i].data(), pitch, lane_.past[i].data(), pitch_, length_);
    }
    lane_.stream.wait();  // `past` may be allocated anew
    std::swap(lane_.past, lane_.present);
    pitch_ = pitch;
  }

  /// Sets shapes and places of decode's contexts, unless they are as the last step left them.
  void bind() {
    std::vector<const void*> wanted{reinterpret_cast<const void*>(rows()),
                                    reinterpret_cast<const void*>(pitch_)};
    for (std::size_t i = 0; i < lane_.cache.size(); ++i) {
      lane_.present[i].reserve(heads(i) * (pitch_ + 1) * position_bytes(i));
      wanted.push_back(lane_.past[i].data());
      wanted.push_back(lane_.present[i].data());
    }
    if (wanted == lane_.bound) return;
    lane_.graph.reset();
    lane_.runs = 0;
    lane_.bound.clear();
    const EngineInfo& embed = lane_.embed_token.info();
    const EngineInfo& decode = lane_.decode.info();
    lane_.token_inputs =
        lane_.token.lay_out({{embed.integers("input_ids"), {rows(), 1}},
                             {{"image_features", embed.dtype("image_features")}, image_features_},
                             {decode.integers("position_ids"), {rows(), 1}},
                             {decode.integers("attention_mask"), {rows(), pitch_ + 1}}});
    const auto& inputs = lane_.token_inputs;
    lane_.embed_token.set_inputs({inputs[0], inputs[1]}, lane_.stream);
    Sizes embeds = lane_.embed_token.set_output("inputs_embeds", lane_.token_embeds);
    std::vector<TrtInput> all{
        {"inputs_embeds", embeds, lane_.token_embeds.data(), nullptr}, inputs[2], inputs[3]};
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      all.push_back({lane_.cache[i].past, cache_sizes(i, pitch_), lane_.past[i].data(), nullptr});
    lane_.decode.set_inputs(all, lane_.stream);
    for (std::size_t i = 0; i < lane_.cache.size(); ++i)
      lane_.decode.set_output(lane_.cache[i].present, lane_.present[i]);
    lane_.decode.set_output("logits", lane_.logits);
    lane_.bound = std::move(wanted);
  }

  void write_inputs(const std::vector<std::int64_t>& tokens,
                    const std::vector<std::int64_t>& positions) {
    const auto& inputs = lane_.token_inputs;
    std::copy(tokens.begin(), tokens.end(), static_cast<std::int64_t*>(inputs[0].host));
    std::copy(positions.begin(), positions.end(), static_cast<std::int64_t*>(inputs[2].host));
    auto* mask = static_cast<std::int64_t*>(inputs[3].host);
    for (std::int64_t padding : padding_) {
      std::fill_n(mask, padding, 0);
      std::fill(mask + padding, mask + length_, 1);
      std::fill(mask + length_, mask + pitch_, 0);
      mask[pitch_] = 1;  // the new token comes behind the free positions
      mask += pitch_ + 1;
    }
  }

  /// All of a step but what moves with the cache's length; false where TensorRT refuses.
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
    bool capture = keeps_room_ && lane_.can_capture && lane_.runs > 0 && !lane_.graph;
    if (capture && !lane_.graph.capture(lane_.stream, [&] { return launch(); })) {
      lane_.graph.reset();
      lane_.can_capture = false;
    }
    if (lane_.graph)
      lane_.graph.launch(lane_.stream);
    else if (!launch())
      throw Error("decoder_decode: TensorRT does not run the engine: " + lane_.decode.log().last());
    ++lane_.runs;
  }

  /// The new token's K and V from behind the free positions to the first of them; without any, what
  /// decode wrote is the cache.
  void keep_new() {
    if (length_ < pitch_) {
      for (std::size_t i = 0; i < lane_.cache.size(); ++i) {
        std::size_t bytes = position_bytes(i);
        copy(i, lane_.past[i].data() + bytes * length_, pitch_,
             lane_.present[i].data() + bytes * pitch_, pitch_ + 1, 1);
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
  std::vector<std::int64_t> padding_;
  Sizes image_features_;
  bool keeps_room_;
  std::int64_t length_;  // cached positions of the longest row
  std::int64_t pitch_;   // positions of `past`, free ones included
  mutable std::vector<float> converted_;
  double graph_ms_ = 0;
};

}  // namespace

std::unique_ptr<Sequence> make_sequence(TrtPrefilled prefilled, bool cuda_graphs) {
  return std::make_unique<TrtSequence>(std::move(prefilled), cuda_graphs);
}

}  // namespace skipvision
