# CUDA, where it works, and which architectures to build for.

# A100, RTX 30, Jetson Orin, RTX 40 / L4, H100, B200, Jetson Thor, RTX 50.
set(SKIPVISION_ARCHITECTURES 80 86 87 89 90 100 110 120)

# The list above, as far as this nvcc knows it: machine code for each and PTX of the last for what comes later.
function(skipvision_supported_architectures result)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  set(found)
  foreach(architecture IN LISTS SKIPVISION_ARCHITECTURES)
    if(known MATCHES "compute_${architecture}[\r\n]")
      list(APPEND found ${architecture})
    endif()
  endforeach()
  list(POP_BACK found last)
  list(TRANSFORM found APPEND "-real")
  set(${result} ${found} ${last} PARENT_SCOPE)
endfunction()

# Turns CUDA on. Without a compiler that works, says so and leaves CMAKE_CUDA_COMPILER false.
macro(skipvision_enable_cuda)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(skipvision_chosen "${CMAKE_CUDA_ARCHITECTURES}")
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    if(NOT skipvision_chosen)
      skipvision_supported_architectures(CMAKE_CUDA_ARCHITECTURES)
    endif()
    message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES}")
  else()
    message(STATUS "No CUDA compiler that works (CMAKE_CUDA_COMPILER, CUDACXX): only the tests on the CPU are built.")
  endif()
endmacro()
