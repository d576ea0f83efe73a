#include "trt_manifest.h"

#include <algorithm>

#include "sha256.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

constexpr int kSchemaVersion = 1;
constexpr char kFile[] = "engines.json";
constexpr char kAgain[] = "build again";

std::string text(const Sizes& sizes) {
  std::string all;
  for (std::int64_t size : sizes) all += (all.empty() ? "" : ", ") + std::to_string(size);
  return "[" + all + "]";
}

Sizes read_sizes(const Field& list) {
  Sizes sizes;
  for (const Field& size : list.items()) sizes.push_back(size.integer());
  return sizes;
}

std::map<std::string, SizeRange> read_profile(const Field& inputs) {
  std::map<std::string, SizeRange> profile;
  for (const auto& [name, shapes] : inputs.members()) {
    auto each = shapes.items();
    if (each.size() != 3) shapes.fail("expected the shapes [min, opt, max]");
    SizeRange range{read_sizes(each[0]), read_sizes(each[2])};
    if (range.low.size() != range.high.size()) shapes.fail("expected shapes of as many axes");
    profile[name] = range;
  }
  return profile;
}

EngineInfo read_engine(const std::string& graph, const Field& field) {
  EngineInfo info;
  info.graph = graph;
  info.file = inside_path(field.at("file"), field.at("file").text());
  info.size_and_hash = read_file_info(field);
  info.builder_version = field.at("builder_version").text();
  info.plugin_layers = field.at("plugin_layers").integer();
  info.inputs = read_tensors(field.at("inputs"));
  info.outputs = read_tensors(field.at("outputs"));
  for (const Field& profile : field.at("profiles").items())
    info.profiles.push_back(read_profile(profile));
  if (info.profiles.empty()) field.at("profiles").fail("has no profile");
  for (const TensorInfo& input : info.inputs)
    for (std::size_t i = 0; i < info.profiles.size(); ++i)
      if (!info.profiles[i].count(input.name))
        field.at("profiles").items()[i].fail("has no shapes of " + input.name);
  return info;
}

void check_route(const Field& root) {
  std::string route = root.at("route").text();
  if (route == "tensorrt") return;
  if (route == "tensorrt_rtx" || route == "trt-rtx")
    root.at("route").fail("is " + route +
                          ": TensorRT-RTX's engines need its own runtime, this library runs "
                          "TensorRT's; build with a recipe of product = \"tensorrt\"");
  root.at("route").fail("is " + route + ", expected tensorrt; " + kAgain);
}

}  // namespace

bool SizeRange::holds(const Sizes& sizes) const {
  if (sizes.size() != low.size()) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] < low[i] || sizes[i] > high[i]) return false;
  return true;
}

const std::string& EngineInfo::dtype(const std::string& tensor) const {
  for (const auto* list : {&inputs, &outputs})
    for (const TensorInfo& each : *list)
      if (each.name == tensor) return each.dtype;
  throw Error("the engine " + file.string() + " has no tensor " + tensor + "; " + kAgain);
}

TensorInfo EngineInfo::integers(const std::string& input) const {
  if (dtype(input) != "int64")
    throw Error(graph + ": " + input + " is " + dtype(input) + ", expected int64; " + kAgain);
  return {input, "int64"};
}

int EngineInfo::find_profile(const std::map<std::string, Sizes>& shapes) const {
  for (std::size_t i = 0; i < profiles.size(); ++i)
    if (std::all_of(shapes.begin(), shapes.end(), [&](const auto& input) {
          auto found = profiles[i].find(input.first);
          return found != profiles[i].end() && found->second.holds(input.second);
        }))
      return static_cast<int>(i);
  return -1;
}

int EngineInfo::choose_profile(const std::map<std::string, Sizes>& shapes) const {
  int found = find_profile(shapes);
  if (found >= 0) return found;
  for (const auto& [name, sizes] : shapes) {
    auto range = profiles[0].find(name);
    if (range == profiles[0].end()) dtype(name);  // throws
    if (range != profiles[0].end() && !range->second.holds(sizes))
      throw Error(graph + ": " + name + " " + text(sizes) + " is outside [" +
                  text(range->second.low) + ", " + text(range->second.high) +
                  "] in every profile; build with a recipe whose profiles hold it");
  }
  throw Error(graph +
              ": no profile holds all inputs' shapes; build with a recipe of one that does");
}

std::int64_t EngineInfo::largest(const std::string& input, std::size_t axis) const {
  std::int64_t most = 0;
  for (const auto& profile : profiles) {
    auto found = profile.find(input);
    if (found != profile.end() && axis < found->second.high.size())
      most = std::max(most, found->second.high[axis]);
  }
  return most;
}

EnginesManifest EnginesManifest::load(const std::filesystem::path& folder,
                                      const std::filesystem::path& bundle) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(folder / kFile, ignored))
    throw Error(folder.string() + " holds no engines: it has no " + kFile +
                "; run `skipvision build`");
  std::string text = read_file(folder / kFile);
  Document document(text, (folder / kFile).string(), kAgain);
  Field root = document.root();
  check_schema(root, kSchemaVersion, kAgain);
  check_route(root);
  if (root.at("bundle").at("sha256").text() != sha256_of(bundle / kManifestFile))
    root.at("bundle").at("sha256").fail("the engines were built from another bundle than " +
                                        bundle.string() + "; " + kAgain);
  EnginesManifest manifest;
  manifest.folder = folder;
  Field recipe = root.at("recipe");
  manifest.version_compatible = recipe.at("builder").flag_or("version_compatible", false);
  manifest.holds_plugin = recipe.at("plugin").flag_or("serialize", false);
  for (const auto& [graph, field] : root.at("engines").members())
    manifest.engines[graph] = read_engine(graph, field);
  check_digest(root, text, kAgain);
  return manifest;
}

void EnginesManifest::verify(bool hashes) const {
  for (const auto& [graph, info] : engines)
    verify_file(folder / info.file, info.size_and_hash, hashes, kAgain);
}

const EngineInfo& EnginesManifest::engine(const std::string& graph) const {
  auto found = engines.find(graph);
  if (found == engines.end())
    throw Error((folder / kFile).string() + ": engines." + graph + ": is missing; " + kAgain);
  return found->second;
}

bool EnginesManifest::has_plugin_layers() const {
  return std::any_of(engines.begin(), engines.end(),
                     [](const auto& each) { return each.second.plugin_layers > 0; });
}

}  // namespace skipvision
