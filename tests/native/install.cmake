# cmake -DBUILD= -DWORK= -DLANGUAGE= -DCOMPILER= -DDRIVERS= -P install.cmake: installs, builds the
# consumer in that language alone, runs it without a driver and with the libcuda.so.1 of DRIVERS.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/consumer -B ${WORK}/build -DLANGUAGE=${LANGUAGE}
  -DCMAKE_${LANGUAGE}_COMPILER=${COMPILER} -DCMAKE_PREFIX_PATH=${WORK}/prefix)
run(${CMAKE_COMMAND} --build ${WORK}/build)
foreach(kind SHARED STATIC)
  set(program ${WORK}/build/consumer_${kind})
  run(${CMAKE_COMMAND} -E env PYTHIA_KERNELS_LIBCUDA=/nowhere ${program} "no CUDA driver, or one without a device")
  # an empty name is none
  run(${CMAKE_COMMAND} -E env PYTHIA_KERNELS_LIBCUDA= LD_LIBRARY_PATH=${DRIVERS} ${program} success)
endforeach()
