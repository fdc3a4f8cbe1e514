// A small pool of threads that sleep between tasks. PyTorch brings its own OpenMP runtime; a second one in
// the process would spin against it.
#pragma once

#include <cstdint>
#include <functional>

namespace ncfast {

// Calls task(i, slot) for every i in [0, count) on at most `threads` threads, the caller among them, and
// returns when all are done. `slot` in [0, threads) tells the threads apart. Tasks are handed out in order
// and must not throw. A call made while another thread's is running runs on the caller alone.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t i, int slot)>& task);

}  // namespace ncfast
