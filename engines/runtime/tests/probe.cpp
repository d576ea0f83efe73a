/// Says what parts of the library make of their input, for tests/engines/test_cpp_runtime.py, which
/// compares it with Hugging Face: one JSON request from standard input, one JSON answer.
#include <fstream>
#include <iostream>
#include <thread>

#include "ort_backend.h"
#include "processor.h"
#include "tokenizer.h"

namespace {

using nlohmann::json;

/// {"tokenizer": FILE, "texts": [..]} -> lists of ids.
json encode(const json& request) {
  skipvision::Document file(request["tokenizer"].get<std::string>(), "again");
  skipvision::Tokenizer tokenizer(file);
  json all = json::array();
  for (const json& text : request["texts"])
    all.push_back(tokenizer.encode(text.get<std::string>()));
  return all;
}

/// {"tokenizer": FILE, "ids": [[..]]} -> for each list the pieces as they come, and the rest.
json decode(const json& request) {
  skipvision::Document file(request["tokenizer"].get<std::string>(), "again");
  skipvision::Tokenizer tokenizer(file);
  json all = json::array();
  for (const json& ids : request["ids"]) {
    skipvision::Detokenizer detokenizer(tokenizer);
    json pieces = json::array();
    for (const json& id : ids) pieces.push_back(detokenizer.push(id.get<std::int64_t>()));
    pieces.push_back(detokenizer.finish());
    all.push_back(pieces);
  }
  return all;
}

/// {"folder": BUNDLE, "images": [..], "out": FILE}: their float32 tensors, one behind the other
/// -> height, width.
json pixels(const json& request) {
  auto processor = skipvision::ImageProcessor::load(request["folder"].get<std::string>());
  std::ofstream out(request["out"].get<std::string>(), std::ios::binary);
  for (const json& image : request["images"]) {
    auto values = processor(skipvision::Picture::open(image.get<std::string>()));
    out.write(reinterpret_cast<const char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(float)));
  }
  return {processor.height(), processor.width()};
}

/// {"bundle": .., "engines": .., "image": .., "prompts": [..]}: two threads, each with all prompts
/// on one bundle and on one of its own -> whether all answers are the same.
json threads(const json& request) {
  std::string folder = request["bundle"].get<std::string>();
  skipvision::BundleOptions options;
  options.verify_hashes = false;
  options.threads = 1;
  options.engines = request.value("engines", "");
  skipvision::Bundle shared(folder, options);
  auto picture = skipvision::Picture::open(request["image"].get<std::string>());
  std::vector<std::string> texts(2);
  auto work = [&](int number) {
    skipvision::Bundle own(folder, options);
    for (const json& prompt : request["prompts"]) {
      auto question = prompt.get<std::string>();
      texts[number] += shared.generate(picture, question).text + "\n";
      texts[number] += own.generate(picture, question).text + "\n";
    }
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  return texts;
}

/// {"bundle": .., "engines": .., "image": .., "prompts": [OUTER, INNER]}: answers OUTER, INNER with
/// each piece of it, and each once more -> texts of OUTER, INNER (the last one), OUTER, INNER.
json nested(const json& request) {
  skipvision::BundleOptions options;
  options.verify_hashes = false;
  options.engines = request.value("engines", "");
  skipvision::Bundle bundle(request["bundle"].get<std::string>(), options);
  auto picture = skipvision::Picture::open(request["image"].get<std::string>());
  auto outer = request["prompts"][0].get<std::string>();
  auto inner = request["prompts"][1].get<std::string>();
  std::string within;
  auto mixed = bundle.generate(picture, outer, {}, [&](std::string_view) {
    within = bundle.generate(picture, inner).text;
    return true;
  });
  return {mixed.text, within, bundle.generate(picture, outer).text,
          bundle.generate(picture, inner).text};
}

/// {"bundle": .., "pixels": FILE of float32 [N, 3, side, side], "side": .., "prompts": N lists of
/// ids, "tokens": N lists of ids to go on with, "batches": lists of prompts, "out": FILE} -> logits
/// in float32, of each batch those of its rows after prefill, then after each step.
json logits(json request) {
  std::filesystem::path folder = request["bundle"].get<std::string>();
  auto manifest = skipvision::Manifest::load(folder);
  skipvision::OrtBackend backend(folder, manifest, {1});
  std::string pixels = skipvision::read_file(request["pixels"].get<std::string>());
  auto side = request["side"].get<std::int64_t>();
  std::vector<skipvision::ModelInput> prompts;
  for (const json& ids : request["prompts"]) {
    std::size_t count = 3 * side * side;
    auto* first = reinterpret_cast<const float*>(pixels.data()) + prompts.size() * count;
    prompts.push_back({{first, first + count}, 0, side, side, ids});
  }
  std::vector<std::vector<std::int64_t>> tokens = request["tokens"];
  std::ofstream out(request["out"].get<std::string>(), std::ios::binary);
  for (std::vector<std::size_t> batch : request["batches"]) {
    std::vector<skipvision::ModelInput> inputs;
    std::vector<std::int64_t> next, positions;
    for (std::size_t i : batch) {
      inputs.push_back(prompts.at(i));
      positions.push_back(static_cast<std::int64_t>(prompts[i].ids.size()));
    }
    auto sequence = backend.prefill(inputs);
    for (std::size_t step = 0;; ++step) {
      for (std::size_t row = 0; row < batch.size(); ++row) {
        skipvision::Logits values = sequence->logits(row);
        out.write(reinterpret_cast<const char*>(values.data),
                  static_cast<std::streamsize>(values.size * sizeof(float)));
      }
      if (step == tokens.at(batch[0]).size()) break;
      if (step == 2 && !request["keep"].is_null()) {
        std::vector<std::size_t> rows = request["keep"], all = batch;
        std::vector<std::int64_t> places = positions;
        sequence->keep(rows);
        batch.clear();
        positions.clear();
        for (std::size_t row : rows) {
          batch.push_back(all.at(row));
          positions.push_back(places.at(row));
        }
      }
      next.clear();
      for (std::size_t i : batch) next.push_back(tokens.at(i).at(step));
      sequence->step(next, positions);
      for (auto& position : positions) ++position;
    }
  }
  return true;
}

/// {"bundle": .., "ids": [..], "side": .., "steps": .., "share": ..}: prefill, then so many decode
/// steps; without one, decode's session is not created -> peak resident memory in KiB.
json peak(const json& request) {
  std::filesystem::path folder = request["bundle"].get<std::string>();
  auto manifest = skipvision::Manifest::load(folder);
  skipvision::OrtBackend backend(folder, manifest, {1, request["share"].get<bool>(), false});
  auto side = request["side"].get<std::int64_t>();
  std::vector<skipvision::ModelInput> inputs(1);
  inputs[0] = {std::vector<float>(3 * side * side, 0.5F), 0, side, side, request["ids"]};
  auto position = static_cast<std::int64_t>(inputs[0].ids.size());
  int steps = request["steps"].get<int>();
  if (steps == 0) backend.run_prefill(inputs);
  if (steps > 0) {
    auto sequence = backend.prefill(inputs);
    for (int step = 0; step < steps; ++step) sequence->step({inputs[0].ids[0]}, {position++});
  }
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (long kib = 0; word == "VmHWM:" && status >> kib) return kib;
  return nullptr;
}

}  // namespace

int main() {
  try {
    json request = json::parse(std::cin);
    std::string what = request["what"].get<std::string>();
    json answer = what == "encode"   ? encode(request)
                  : what == "decode" ? decode(request)
                  : what == "pixels" ? pixels(request)
                  : what == "nested" ? nested(request)
                  : what == "logits" ? logits(request)
                  : what == "peak"   ? peak(request)
                                     : threads(request);
    std::cout << answer.dump() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
