/// skipvision-run BUNDLE --image FILE --prompt TEXT: what `skipvision generate` does, without
/// Python.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "skipvision/skipvision.h"

namespace {

using nlohmann::json;

struct Arguments {
  Arguments() { options.max_batch = 1; }  // a line is answered before the next one is read

  std::string bundle, image, prompt, json_file;
  bool bench = false, no_hashes = false;
  int rounds = 10;
  skipvision::BundleOptions bundle_options;
  skipvision::GenerateOptions options;
};

/// Peak resident memory of the process in MB of 10^6 bytes; 0 where there is no /proc. Not
/// getrusage's, which counts what the parent had before it started this program.
double peak_rss_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (double kib = 0; word == "VmHWM:" && status >> kib) return kib * 1024 / 1e6;
  return 0;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// The keys of `skipvision generate --json`.
json to_json(const skipvision::Answer& answer) {
  const auto& s = answer.statistics;
  return {{"text", answer.text},
          {"token_ids", answer.token_ids},
          {"prompt_tokens", s.prompt_tokens},
          {"retained_tokens", s.retained_tokens},
          {"skipped_tokens", s.skipped_tokens},
          {"kv_tokens_after_prefill", s.kv_tokens_after_prefill},
          {"ttft_ms", s.ttft_ms},
          {"decode_ms_per_token", s.decode_ms_per_token}};
}

/// Medians over rounds, after one that is not counted, of as many requests at once as --batch says.
json bench(const skipvision::Bundle& bundle, const skipvision::Picture& picture,
           const Arguments& arguments) {
  std::vector<skipvision::Request> requests(std::max(arguments.options.max_batch, 1),
                                            {picture, arguments.prompt});
  std::vector<double> prepare, first, steps, outside;
  int tokens = 0;
  for (int round = 0; round <= arguments.rounds; ++round) {
    auto answer = bundle.generate(requests, arguments.options).front();
    if (round == 0) continue;
    const auto& s = answer.statistics;
    prepare.push_back(s.prepare_ms);
    first.push_back(s.ttft_ms);
    steps.insert(steps.end(), s.decode_ms.begin(), s.decode_ms.end());
    outside.insert(outside.end(), s.outside_ms.begin(), s.outside_ms.end());
    tokens = static_cast<int>(answer.token_ids.size());
  }
  return {{"rounds", arguments.rounds},
          {"batch", requests.size()},
          {"new_tokens", tokens},
          {"prepare_ms", median(prepare)},
          {"ttft_ms", median(first)},
          {"decode_ms_per_token", median(steps)},
          {"outside_ms_per_token", median(outside)},
          {"peak_rss_mb", peak_rss_mb()}};
}

void write_json(const std::string& file, const json& data) {
  if (file.empty()) return;
  std::ofstream stream(file);
  stream << data.dump(1) << "\n";
  if (!stream.flush()) throw skipvision::Error(file + " cannot be written");
}

/// Requests as lines {"image": FILE, "prompt": TEXT}, answers as lines of JSON; `max_batch` lines
/// are read, then answered together.
void serve_lines(const skipvision::Bundle& bundle, const Arguments& arguments) {
  std::vector<skipvision::Request> requests;
  auto answer = [&] {
    for (const auto& done : bundle.generate(requests, arguments.options))
      std::cout << to_json(done).dump() << std::endl;
    requests.clear();
  };
  std::string line;
  for (int number = 1; std::getline(std::cin, line); ++number) {
    json request = json::parse(line, nullptr, false);
    if (!request.is_object() || !request["image"].is_string() || !request["prompt"].is_string())
      throw skipvision::Error("line " + std::to_string(number) +
                              " is no {\"image\": FILE, \"prompt\": TEXT}");
    requests.push_back({skipvision::Picture::open(request["image"].get<std::string>()),
                        request["prompt"].get<std::string>()});
    if (static_cast<int>(requests.size()) >= arguments.options.max_batch) answer();
  }
  answer();
}

void run(Arguments& arguments, bool lines) {
  arguments.bundle_options.verify_hashes = !arguments.no_hashes;
  if (!lines && (arguments.image.empty() || arguments.prompt.empty()))
    throw skipvision::Error("expected --image FILE and --prompt TEXT, or --lines");
  skipvision::Bundle bundle(arguments.bundle, arguments.bundle_options);
  if (lines) return serve_lines(bundle, arguments);
  auto picture = skipvision::Picture::open(arguments.image);
  if (arguments.bench) {
    json result = bench(bundle, picture, arguments);
    std::cout << result.dump(1) << "\n";
    return write_json(arguments.json_file, result);
  }
  auto answer = bundle.generate(picture, arguments.prompt, arguments.options, [](auto piece) {
    std::cout << piece << std::flush;
    return true;
  });
  std::cout << "\n";
  write_json(arguments.json_file, to_json(answer));
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  bool lines = false;
  CLI::App app("Answer a question about a picture with a bundle that `skipvision export` wrote.");
  app.add_option("bundle", arguments.bundle, "The bundle's folder")->required();
  app.add_option("--image", arguments.image, "A PNG or JPEG file");
  app.add_option("--prompt", arguments.prompt,
                 "A question, or a whole prompt with its placeholder");
  app.add_option("--max-new-tokens", arguments.options.max_new_tokens, "Where an answer is cut");
  app.add_option("--temperature", arguments.options.temperature, "0 (greedy) or more");
  app.add_option("--top-k", arguments.options.top_k, "Of the K likeliest tokens; 0 for all");
  app.add_option("--top-p", arguments.options.top_p, "Of the likeliest that reach P");
  app.add_option("--seed", arguments.options.seed, "Of the sampling");
  app.add_option("--batch", arguments.options.max_batch,
                 "Requests of --lines or --bench that run together");
  app.add_option("--threads", arguments.bundle_options.threads, "0 lets ONNX Runtime choose");
  app.add_option("--engines", arguments.bundle_options.engines,
                 "Run the engines in this folder, of `skipvision build`, in TensorRT");
  app.add_option("--plugin", arguments.bundle_options.plugin,
                 "The KVPrune library of --engines; else the one beside them");
  app.add_flag("!--no-cuda-graphs", arguments.bundle_options.cuda_graphs,
               "Launch each kernel of --engines on its own");
  app.add_option("--json", arguments.json_file, "Write the result to this file");
  app.add_option("--rounds", arguments.rounds, "Timed rounds of --bench")
      ->check(CLI::PositiveNumber);
  app.add_flag("--no-hashes", arguments.no_hashes, "Check the files' sizes only");
  app.add_flag("--bench", arguments.bench, "Print times and peak memory as JSON");
  app.add_flag("--lines", lines,
               "Requests from standard input: {\"image\": FILE, \"prompt\": TEXT}");
  try {
    app.parse(argc, argv);
    run(arguments, lines);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
