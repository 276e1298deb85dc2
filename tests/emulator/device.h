// device.h - a device that is a GPU to ggml and runs on the CPU, as the tests of it see it: counting_device.cpp or
// hip_runtime.cpp, each a library.
#pragma once

#include <cstdint>

extern "C" {

struct device_counts {
    int64_t waits;      // for the device to be done: synchronize, and copies that do not return before they are made
    int64_t graphs;     // handed to the device
    int64_t bytes_in;   // from the host
    int64_t bytes_out;  // to the host
    int64_t kernels;    // launched one by one
    int64_t captures;   // of such launches into a graph of the device's own
    int64_t replays;    // of a captured graph
};

// Registers the device, once a process. refused: ops that it is to have no kernel for, by name, with commas between.
void device_register(const char * refused);

// What was counted since the last call.
device_counts device_take(void);
}
