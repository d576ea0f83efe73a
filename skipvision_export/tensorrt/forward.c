/* TensorRT's C entry points, forwarded to TensorRT-RTX.
 *
 * The Python bindings of TensorRT 11 ask for libnvinfer, libnvonnxparser and libnvinfer_plugin; on the
 * pip-only route the compiler is libtensorrt_rtx. This file, compiled once for each of those names,
 * answers the bindings. Whatever version the caller was built for, the library gets its own: it refuses
 * any other. Both libraries must be loaded before the first call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CORE "libtensorrt_rtx.so.1"
#define PARSER "libtensorrt_onnxparser_rtx.so.1"

static void* find(const char* library, const char* name)
{
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    void* symbol = handle ? dlsym(handle, name) : NULL;
    if (!symbol) {
        fprintf(stderr, "skipvision: %s has no %s\n", library, name);
        abort();
    }
    return symbol;
}

static int32_t core_version(void)
{
    return ((int32_t(*)(void)) find(CORE, "getInferLibVersion"))();
}

int32_t getNvOnnxParserVersion(void)
{
    return ((int32_t(*)(void)) find(PARSER, "getNvOnnxParserVersion"))();
}

void* createInferBuilder_INTERNAL(void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, int32_t)) find(CORE, "createInferBuilder_INTERNAL"))(logger, core_version());
}

void* createInferRuntime_INTERNAL(void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, int32_t)) find(CORE, "createInferRuntime_INTERNAL"))(logger, core_version());
}

void* createInferRefitter_INTERNAL(void* engine, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) find(CORE, "createInferRefitter_INTERNAL"))(
        engine, logger, core_version());
}

void* createNvOnnxParser_INTERNAL(void* network, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) find(PARSER, "createNvOnnxParser_INTERNAL"))(
        network, logger, getNvOnnxParserVersion());
}

void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) find(PARSER, "createNvOnnxParserRefitter_INTERNAL"))(
        refitter, logger, getNvOnnxParserVersion());
}

void* getPluginRegistry(void)
{
    return ((void* (*) (void)) find(CORE, "getPluginRegistry"))();
}

void* getBuilderPluginRegistry(int32_t capability)
{
    return ((void* (*) (int32_t)) find(CORE, "getBuilderPluginRegistry"))(capability);
}

/* TensorRT-RTX has no plugins of its own to register. */
bool initLibNvInferPlugins(void* logger, const char* plugin_namespace)
{
    (void) logger;
    (void) plugin_namespace;
    return true;
}
