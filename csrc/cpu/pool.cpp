#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace ncfast {
namespace {

// Calls function(data) on each of `threads` threads, the caller among them, and returns when all have
// returned: what compilers turn `#pragma omp parallel` into. GNU's, LLVM's and Intel's runtimes have it.
using OmpParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

bool forked = false;  // threads of a runtime do not survive a fork, and GNU's would wait for them for ever

// The runtime that PyTorch has loaded, or null.
OmpParallel omp_parallel() {
#if defined(__linux__)
  static const auto found = reinterpret_cast<OmpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
#else
  return nullptr;
#endif
}

struct Tasks {
  const std::function<void(int64_t, int)>& task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> slots{0};

  static void drain(void* data) {
    Tasks& tasks = *static_cast<Tasks*>(data);
    const int slot = tasks.slots++;
    for (int64_t i; (i = tasks.next++) < tasks.count;) tasks.task(i, slot);
  }
};

// A call has many short tasks in a row, and waking a thread takes longer than some of them. So one that has
// nothing to do looks out for more for some 50 microseconds before it sleeps: too short to disturb anybody.
template <class Condition>
void look_out(const Condition& condition) {
  for (int i = 0; i < 1000 && !condition(); i++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }
}

class Pool {
 public:
  // The pool of this process, leaked on purpose: at exit its threads sleep and hold nothing.
  static Pool*& current() {
    static Pool* pool = new Pool;
    return pool;
  }

  void run(int threads, int64_t count, const std::function<void(int64_t, int)>& task) {
    if (threads <= 1 || count <= 1 || busy_.exchange(true)) {
      for (int64_t i = 0; i < count; i++) task(i, 0);
      return;
    }
    const Release release{busy_};
    const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int slot = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, slot, seen = epoch_.load()] { work(slot, seen); });
      }
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = helpers;
      running_ = helpers;
      epoch_++;
    }
    wake_.notify_all();
    drain(task, count, 0);
    look_out([this] { return running_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  // No mutex: a task may run a signal handler, and that another call, on the thread that keeps the pool busy.
  struct Release {
    std::atomic<bool>& busy;
    ~Release() { busy = false; }
  };

  void drain(const std::function<void(int64_t, int)>& task, int64_t count, int slot) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, slot);
  }

  void work(int slot, uint64_t seen) {
    for (;;) {
      look_out([&] { return epoch_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (slot > helpers_) continue;
      const auto* task = task_;
      const int64_t count = count_;
      lock.unlock();
      drain(*task, count, slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t count_ = 0;
  int helpers_ = 0;
  std::atomic<int> running_{0};  // these two change under the mutex only
  std::atomic<uint64_t> epoch_{0};
};

// A forked child has none of its parent's threads: it starts a pool of its own. From the moment this library
// is loaded, which importing ncfast does.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  Pool::current() = new Pool;
  forked = true;
});

}  // namespace

void parallel_for(int threads, int64_t count, const std::function<void(int64_t, int)>& task) {
  Pool& pool = *Pool::current();
  const OmpParallel parallel = threads > 1 && count > 1 ? omp_parallel() : nullptr;
  if (!parallel) return pool.run(threads, count, task);
  Tasks tasks{task, count};
  // As many threads as PyTorch uses, though there be fewer tasks: the runtime ends those it is not asked for.
  parallel(Tasks::drain, &tasks, static_cast<unsigned>(threads), 0);
}

}  // namespace ncfast
