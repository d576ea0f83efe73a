#include "manifest.h"

#include <algorithm>

#include "sha256.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

constexpr int kSchemaVersion = 1;
constexpr char kAgain[] = "export again";
// More visual tokens than any model's context holds; an altered count must not fill the memory.
constexpr std::int64_t kMaxTokens = 1 << 20;

Layout read_layout(const Field& roles, int num_layers) {
  Layout layout;
  for (const Field& item : roles.at("layout").items()) {
    auto pair = item.items();
    if (pair.size() != 2) item.fail("expected [role, count]");
    Run run;
    if (!set_role(run, pair[0].text())) pair[0].fail("'" + pair[0].text() + "' is no known role");
    run.count = pair[1].integer(0, kMaxTokens);
    layout.runs.push_back(run);
    if (layout.total() > kMaxTokens) item.fail("too many visual tokens");
  }
  if (layout.total() == 0) roles.at("layout").fail("has no visual tokens");
  auto read = [&](const char* name, std::vector<int>& tiers, std::size_t size) {
    if (!roles.has(name)) return;
    for (const Field& tier : roles.at(name).items())
      tiers.push_back(static_cast<int>(tier.integer(0, 1024)));
    if (!tiers.empty() && tiers.size() != size)
      roles.at(name).fail("expected " + std::to_string(size) + " tiers");
  };
  read("tiers", layout.tiers, layout.runs.size());
  read("layer_tiers", layout.layer_tiers, static_cast<std::size_t>(num_layers));
  return layout;
}

}  // namespace

void check_schema(const Field& root, int expected, const std::string& again) {
  auto version = root.at("schema_version").integer(0);
  if (version != expected)
    root.at("schema_version")
        .fail("is " + std::to_string(version) + ", this version reads " + std::to_string(expected) +
              "; " + again);
}

void check_digest(const Field& root, std::string text, const std::string& again) {
  std::string digest = root.at("digest").text();
  auto written = [](const std::string& each) { return "\"digest\": \"" + each + "\""; };
  auto at = text.find(written(digest));
  if (digest.empty() || at == std::string::npos) root.at("digest").fail("is altered; " + again);
  text.replace(at, written(digest).size(), written(""));
  if (sha256_of_text(text) != digest)
    root.at("digest").fail("is not the sha256 of the file, which is altered; " + again);
}

std::filesystem::path inside_path(const Field& field, const std::string& path) {
  std::filesystem::path file = path;
  bool climbs = std::find(file.begin(), file.end(), "..") != file.end();
  if (file.empty() || file.is_absolute() || climbs) field.fail("expected a path inside the folder");
  return file;
}

std::vector<TensorInfo> read_tensors(const Field& list) {
  std::vector<TensorInfo> tensors;
  for (const Field& item : list.items())
    tensors.push_back({item.at("name").text(), item.at("dtype").text()});
  return tensors;
}

FileInfo read_file_info(const Field& field) {
  return {static_cast<std::uint64_t>(field.at("bytes").integer(0, INT64_MAX)),
          field.at("sha256").text()};
}

void verify_file(const std::filesystem::path& file, const FileInfo& info, bool hashes,
                 const std::string& again) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error))
    throw Error(file.string() + " is missing; " + again);
  auto size = std::filesystem::file_size(file, error);
  if (error) throw Error(file.string() + " cannot be read: " + error.message());
  if (size != info.bytes)
    throw Error(file.string() + " is " + (size < info.bytes ? "truncated: " : "altered: ") +
                std::to_string(size) + " bytes, the manifest says " + std::to_string(info.bytes) +
                "; " + again);
  if (hashes && sha256_of(file) != info.sha256)
    throw Error(file.string() + " is altered: its sha256 is not the manifest's; " + again);
}

bool GraphInfo::has_input(const std::string& name) const {
  return std::any_of(inputs.begin(), inputs.end(), [&](const auto& t) { return t.name == name; });
}

Manifest Manifest::load(const std::filesystem::path& folder) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored))
    throw Error(folder.string() + " is not a folder; expected a bundle that export wrote");
  auto file = folder / kManifestFile;
  if (!std::filesystem::is_regular_file(file, ignored))
    throw Error(folder.string() + " is no bundle: it has no " + kManifestFile);
  std::string text = read_file(file);
  Document document(text, file.string(), kAgain);
  Manifest manifest = parse(document);
  check_digest(document.root(), text, kAgain);
  return manifest;
}

Manifest Manifest::parse(const Document& document) {
  Field root = document.root();
  check_schema(root, kSchemaVersion, kAgain);
  Manifest manifest;
  manifest.name = document.name();
  Field model = root.at("model");
  manifest.tiled = model.flag_or("tiled", false);
  if (model.has("max_positions")) manifest.max_positions = model.at("max_positions").integer(1);
  if (model.has("merge_size"))
    model.at("merge_size")
        .fail("is set: the model takes pictures of any shape, which this runtime does not know; run "
              "the bundle with `skipvision generate`");
  manifest.num_layers = static_cast<int>(model.at("num_layers").integer(1, 10000));
  manifest.hidden_size = model.at("hidden_size").integer(1);
  manifest.vocab_size = model.at("vocab_size").integer(1);
  manifest.visual_tokens = model.at("visual_tokens").integer(1, kMaxTokens);
  manifest.image_token_id = model.at("image_token_id").integer(0);
  Field roles = root.at("roles");
  manifest.layout = read_layout(roles, manifest.num_layers);
  manifest.retained = static_cast<int>(roles.at("retained").integer(0, kMaxTokens));
  manifest.skipped = static_cast<int>(roles.at("skipped").integer(0, kMaxTokens));
  manifest.dtype = root.at("dtype").text();
  if (manifest.dtype != "float32" && manifest.dtype != "float16" && manifest.dtype != "bfloat16")
    root.at("dtype").fail("is " + manifest.dtype + ", expected float32, float16 or bfloat16; " +
                          kAgain);
  manifest.references = root.has("referenced") && !root.at("referenced").members().empty();
  if (root.has("prompt")) {
    Field prompt = root.at("prompt");
    manifest.prompt = ChatPrompt{prompt.at("before").text(), prompt.at("after").text(),
                                 prompt.flag_or("strips", false)};
  }
  for (const char* group : {"graphs", "variants"}) {
    if (!root.has(group)) continue;
    for (const auto& [name, graph] : root.at(group).members())
      manifest.graphs[name] = {inside_path(graph.at("file"), graph.at("file").text()),
                               read_tensors(graph.at("inputs")), read_tensors(graph.at("outputs"))};
  }
  // The variants are forms of them: what needs a graph itself may come later, such as padding.
  for (const char* each : {kVision, kEmbed, kPrefill, kDecode})
    manifest.graph(each);
  for (const auto& [name, info] : root.at("files").members()) {
    inside_path(info, name);
    manifest.files[name] = read_file_info(info);
  }
  return manifest;
}

void Manifest::verify(const std::filesystem::path& folder, bool hashes) const {
  for (const auto& [file_name, info] : files) verify_file(folder / file_name, info, hashes, kAgain);
}

const GraphInfo& Manifest::graph(const std::string& graph_name) const {
  auto found = graphs.find(graph_name);
  if (found == graphs.end())
    throw Error(name + ": graphs." + graph_name + ": is missing; export again");
  return found->second;
}

}  // namespace skipvision
