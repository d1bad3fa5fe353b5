# find_package(pythia_kernels): targets pythia_kernels::SHARED and pythia_kernels::STATIC.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/pythia_kernels-targets.cmake)
