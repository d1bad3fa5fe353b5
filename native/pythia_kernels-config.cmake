# find_package(pythia_kernels): targets pythia_kernels::SHARED and pythia_kernels::STATIC.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/pythia_kernels-targets.cmake)
if(NOT CMAKE_CXX_COMPILER_LOADED) # a project in C: the C++ inside is linked by name
  set_property(TARGET pythia_kernels::STATIC APPEND PROPERTY INTERFACE_LINK_LIBRARIES stdc++)
endif()
