/// `skipvision.json`: what a bundle is and what is in it (skipvision_export/bundle/manifest.py).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "json.h"
#include "layout.h"

namespace skipvision {

inline constexpr char kManifestFile[] = "skipvision.json";

// Graphs and tensors by name (skipvision_export/graph/passes/names.py).
inline constexpr char kVision[] = "vision_encoder";
inline constexpr char kEmbed[] = "embed_tokens";
inline constexpr char kPrefill[] = "decoder_prefill";
inline constexpr char kDecode[] = "decoder_decode";
inline constexpr char kPresent[] = "present.";

/// The input of decode that an output is fed to: `present.0.key` -> `past_key_values.0.key`.
inline std::string past_name(const std::string& present) {
  return "past_key_values." + present.substr(sizeof(kPresent) - 1);
}

struct TensorInfo {
  std::string name;
  std::string dtype;
};

struct GraphInfo {
  std::filesystem::path file;
  std::vector<TensorInfo> inputs;
  std::vector<TensorInfo> outputs;

  bool has_input(const std::string& name) const;
};

struct FileInfo {
  std::uint64_t bytes = 0;
  std::string sha256;
};

// What the manifests of bundles and of engines have alike. Errors say `again`, what the user does.

/// Throws Error unless `root.schema_version` is the one that this version reads.
void check_schema(const Field& root, int expected, const std::string& again);
/// Throws Error unless `root.digest` is the hash of `text`, the whole file, with an empty digest.
void check_digest(const Field& root, std::string text, const std::string& again);
/// `path`, which stays inside the manifest's folder; `field` stands in errors.
std::filesystem::path inside_path(const Field& field, const std::string& path);
std::vector<TensorInfo> read_tensors(const Field& list);
/// The fields `bytes` and `sha256`.
FileInfo read_file_info(const Field& field);
/// Throws Error where the file is missing, truncated or, with `hashes`, altered.
void verify_file(const std::filesystem::path& file, const FileInfo& info, bool hashes,
                 const std::string& again);

/// The chat template, rendered at export around a question.
struct ChatPrompt {
  std::string before;
  std::string after;
  bool strips = false;
};

struct Manifest {
  std::string name;  // the file, for errors
  Layout layout;
  int retained = 0;
  int skipped = 0;
  int num_layers = 0;
  std::int64_t hidden_size = 0;
  std::int64_t vocab_size = 0;
  std::int64_t visual_tokens = 0;  // of one crop
  bool tiled = false;              // an image is a thumbnail and tiles
  std::int64_t max_positions = INT32_MAX;  // of a sequence; the graphs have none beyond
  std::int64_t image_token_id = 0;
  std::string dtype;
  bool references = false;  // has weights in links to the model's own files
  std::optional<ChatPrompt> prompt;
  std::map<std::string, GraphInfo> graphs;  // and variants
  std::map<std::string, FileInfo> files;

  /// Reads a bundle's manifest; throws Error with the file's name and the field.
  static Manifest load(const std::filesystem::path& folder);
  static Manifest parse(const Document& document);

  /// Checks that every file is there, whole and, with `hashes`, unaltered; throws Error naming it.
  void verify(const std::filesystem::path& folder, bool hashes) const;
  /// A graph or variant; throws Error where there is none.
  const GraphInfo& graph(const std::string& graph_name) const;
};

}  // namespace skipvision
