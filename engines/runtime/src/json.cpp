#include "json.h"

#include <fstream>
#include <iterator>

#include "skipvision/skipvision.h"

namespace skipvision {

std::string read_file(const std::filesystem::path& file) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(file, ignored))
    throw Error(file.string() + " does not exist or is no file");
  std::ifstream stream(file, std::ios::binary);
  std::string data{std::istreambuf_iterator<char>(stream), {}};
  if (!stream) throw Error(file.string() + " cannot be read");
  return data;
}

Field Field::at(const std::string& key) const {
  if (!value_->is_object()) fail("expected an object");
  auto found = value_->find(key);
  std::string path = path_.empty() ? key : path_ + "." + key;
  if (found == value_->end()) Field(*value_, file_, path).fail("is missing");
  return Field(*found, file_, path);
}

bool Field::has(const std::string& key) const {
  if (!value_->is_object()) return false;
  auto found = value_->find(key);
  return found != value_->end() && !found->is_null();
}

std::string Field::text() const {
  if (!value_->is_string()) fail("expected a string");
  return value_->get<std::string>();
}

bool Field::flag() const {
  if (!value_->is_boolean()) fail("expected true or false");
  return value_->get<bool>();
}

double Field::number() const {
  if (!value_->is_number()) fail("expected a number");
  return value_->get<double>();
}

std::int64_t Field::integer(std::int64_t low, std::int64_t high) const {
  bool fits = value_->is_number_integer();
  if (fits && value_->is_number_unsigned())
    fits = value_->get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX);
  if (fits) {
    auto number = value_->get<std::int64_t>();
    if (low <= number && number <= high) return number;
  }
  fail("expected an integer from " + std::to_string(low) + " to " + std::to_string(high));
}

std::vector<Field> Field::items() const {
  if (!value_->is_array()) fail("expected a list");
  std::vector<Field> all;
  for (std::size_t i = 0; i < value_->size(); ++i)
    all.emplace_back((*value_)[i], file_, path_ + "." + std::to_string(i));
  return all;
}

std::vector<std::pair<std::string, Field>> Field::members() const {
  if (!value_->is_object()) fail("expected an object");
  std::vector<std::pair<std::string, Field>> all;
  for (auto it = value_->begin(); it != value_->end(); ++it)
    all.emplace_back(it.key(), at(it.key()));
  return all;
}

std::string Field::text_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? at(key).text() : fallback;
}

bool Field::flag_or(const std::string& key, bool fallback) const {
  return has(key) ? at(key).flag() : fallback;
}

void Field::fail(const std::string& message) const {
  throw Error(file_ + ": " + (path_.empty() ? "" : path_ + ": ") + message);
}

Document::Document(const std::filesystem::path& file, const std::string& again)
    : Document(read_file(file), file.string(), again) {}

Document::Document(const std::string& text, const std::string& name, const std::string& again)
    : name_(name) {
  try {
    value_ = nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception&) {
    throw Error(name + " is truncated or no JSON; " + again);
  }
}

}  // namespace skipvision
