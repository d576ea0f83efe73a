// A real plugin registry takes the library: loadLibrary, getCreator, createPlugin, deregisterLibrary.
//
//   registry_test TENSORRT_LIBRARY PLUGIN_LIBRARY
//
// TENSORRT_LIBRARY: libnvinfer_lean.so (or libnvinfer.so) of the headers' major version; needs no GPU. Exits 0 or 1.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <memory>

namespace {

int fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  return 1;
}

int check(nvinfer1::IPluginRegistry& registry, const char* library) {
  using namespace nvinfer1;
  if (registry.getCreator("KVPrune", "1", "skipvision") != nullptr) return fail("the creator was there before");
  const auto handle = registry.loadLibrary(library);
  if (handle == nullptr) return fail("loadLibrary");
  IPluginCreatorInterface* found = registry.getCreator("KVPrune", "1", "skipvision");
  if (found == nullptr) return fail("getCreator");
  if (registry.getCreator("KVPrune", "2", "skipvision") != nullptr) return fail("a version that is none");
  auto& creator = *static_cast<IPluginCreatorV3One*>(found);
  std::unique_ptr<IPluginV3> plugin(creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD));
  if (plugin == nullptr) return fail("createPlugin");
  if (plugin->getCapabilityInterface(PluginCapabilityType::kBUILD) == nullptr) return fail("build capability");
  plugin.reset();
  registry.deregisterLibrary(handle);
  if (registry.getCreator("KVPrune", "1", "skipvision") != nullptr) return fail("the creator is still there");
  std::printf("the registry took the library and gave it back\n");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return fail("usage: registry_test TENSORRT_LIBRARY PLUGIN_LIBRARY");
  void* tensorrt = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
  if (tensorrt == nullptr) return fail(dlerror());
  const auto get_registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(tensorrt, "getPluginRegistry"));
  if (get_registry == nullptr || get_registry() == nullptr) return fail("getPluginRegistry");
  return check(*get_registry(), arguments[2]);
}
