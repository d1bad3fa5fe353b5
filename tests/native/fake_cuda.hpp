// A CUDA driver that runs nothing: it reads the cubins it is given and records what is asked of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fake {

struct Code {  // of the one kernel of a cubin, read from the ELF file that the compiler wrote
    std::string symbol;
    int capability = 0;                 // 80, 90, 100
    std::vector<unsigned> parameters;   // bytes of each, in order
    unsigned threads = 0;               // that the compiler was told (reqntid)
    unsigned registers = 0;             // of a thread
};

struct Launch {
    std::uintptr_t context;
    Code code;
    unsigned grid[3], block[3], shared;
    int shared_allowed;  // what cuFuncSetAttribute set, 0: nothing
    void *stream;
    std::vector<std::vector<unsigned char>> parameters;  // as many and as long as the cubin says
    bool ended;  // no parameter more
};

struct Settings {
    int device = 0, major = 9, minor = 0, sms = 132, shared = 227 * 1024;
    int init = 0, load = 0, function = 0, attribute = 0, launch = 0;  // CUresults
    unsigned long long generation = 0;  // of every context: the handles of an earlier one are invalid
    bool id_is_kept = false;            // by the next generation
    void (*loading)() = nullptr;        // called in every load, under no lock
};

struct Counts {
    int inits, loads, unloads, stale;  // stale: launches with handles of an earlier generation
};

Settings &settings();              // read under no lock: set before threads start
bool has_ids();                    // a driver of CUDA 12: it has cuCtxGetId
const char *path();                // of this library
void set_context(std::uintptr_t);  // of the calling thread, 0: none
std::vector<Launch> take_launches();
Counts take_counts();

}  // namespace fake
