# TensorRT's headers, with CUDA's, as TensorRT::headers; and with its library and CUDA's as TensorRT::runtime, where
# there is one (COMPONENTS runtime makes it a must).
#
# Looks in TensorRT_ROOT (CMake or environment variable): a TensorRT package, or a checkout of NVIDIA/TensorRT at the
# release, which has headers only. TensorRT_LIBRARY names the library outright: libnvinfer.so, or libnvinfer_lean.so for
# version-compatible engines; TensorRT_CUDA_LIBRARY libcudart.so; CUDA_PATH (environment) CUDA's folder.
find_path(TensorRT_INCLUDE_DIR NvInfer.h HINTS "${TensorRT_ROOT}" ENV TensorRT_ROOT
          PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE})
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ENV CUDA_PATH
          PATHS /usr/local/cuda PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY NAMES nvinfer nvinfer_lean HINTS "${TensorRT_ROOT}" ENV TensorRT_ROOT
             PATH_SUFFIXES lib lib/${CMAKE_LIBRARY_ARCHITECTURE})
find_library(TensorRT_CUDA_LIBRARY cudart HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES lib64 lib)
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR TensorRT_LIBRARY TensorRT_CUDA_LIBRARY)

if(TensorRT_LIBRARY AND TensorRT_CUDA_LIBRARY)
  set(TensorRT_runtime_FOUND TRUE)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR
                                  HANDLE_COMPONENTS)

if(TensorRT_INCLUDE_DIR AND TensorRT_CUDA_INCLUDE_DIR AND NOT TARGET TensorRT::headers)
  add_library(TensorRT::headers INTERFACE IMPORTED)
  # System: their warnings are not ours.
  set_target_properties(TensorRT::headers PROPERTIES
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}"
    INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}")
endif()
if(TARGET TensorRT::headers AND TensorRT_runtime_FOUND AND NOT TARGET TensorRT::runtime)
  add_library(TensorRT::runtime INTERFACE IMPORTED)
  set_target_properties(TensorRT::runtime PROPERTIES
    INTERFACE_LINK_LIBRARIES "TensorRT::headers;${TensorRT_LIBRARY};${TensorRT_CUDA_LIBRARY}")
endif()
