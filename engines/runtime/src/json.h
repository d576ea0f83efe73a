/// JSON files whose errors name the file and the field.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace skipvision {

/// The whole file; throws Error where it is missing or cannot be read.
std::string read_file(const std::filesystem::path& file);

/// A value inside a JSON file, with its place for errors. Refers to the document, which must
/// outlive it.
class Field {
 public:
  Field(const nlohmann::json& value, std::string file, std::string path = {})
      : value_(&value), file_(std::move(file)), path_(std::move(path)) {}

  /// The member `key`; throws Error where this is no object or has none.
  Field at(const std::string& key) const;
  /// Whether there is a member `key` that is not null.
  bool has(const std::string& key) const;
  bool is_null() const { return value_->is_null(); }
  bool is_array() const { return value_->is_array(); }
  bool is_string() const { return value_->is_string(); }
  bool is_object() const { return value_->is_object(); }

  std::string text() const;
  bool flag() const;
  double number() const;
  /// An integer within [low, high].
  std::int64_t integer(std::int64_t low = 0, std::int64_t high = INT32_MAX) const;
  std::vector<Field> items() const;
  std::vector<std::pair<std::string, Field>> members() const;

  std::string text_or(const std::string& key, const std::string& fallback) const;
  bool flag_or(const std::string& key, bool fallback) const;

  /// Throws Error: "FILE: FIELD: message".
  [[noreturn]] void fail(const std::string& message) const;

 private:
  const nlohmann::json* value_;
  std::string file_;
  std::string path_;
};

/// A parsed file; `root()` is its outermost value.
class Document {
 public:
  /// Throws Error that says `again`, how the user gets a new one, where the file is no JSON.
  Document(const std::filesystem::path& file, const std::string& again);
  /// Of text that is at hand; `name` stands in errors.
  Document(const std::string& text, const std::string& name, const std::string& again);
  Field root() const { return Field(value_, name_); }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  nlohmann::json value_;
};

}  // namespace skipvision
