// What the generated tables.cpp is written in; n is the place of a kernel in the order of names.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>

#include "launcher.hpp"
#include "pythia_kernels.h"

#define ENTRY(name, n)                                                                      \
    {{#name, sizeof(pythia_##name##_args), std::size(arguments_##n), arguments_##n},         \
     counts_##n, images_##n, std::size(images_##n)}

#define FUNCTION(name, n)                                                                   \
    pythia_status pythia_##name(const pythia_##name##_args *args, void *stream) {            \
        return pythia::launch(pythia::kernels[n], args, stream);                             \
    }
