// The threads. PyTorch brings its own OpenMP runtime, whose threads spin for milliseconds after each of its
// operations, and a second set of threads would have to share the processors with them. So the tasks run on
// those same threads where that runtime can be found, and else on a small pool of our own.
#pragma once

#include <cstdint>
#include <functional>

namespace ncfast {

// Calls task(i, slot) for every i in [0, count) on at most `threads` threads, the caller among them, and
// returns when all are done. `slot` in [0, threads) tells the threads apart. Tasks are handed out in order
// and must not throw. On our own pool a call made while another thread's is running runs on the caller alone.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t i, int slot)>& task);

}  // namespace ncfast
