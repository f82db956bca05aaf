#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace bip::cpu {
namespace {

// One job, offered to all threads: whichever is awake takes the next `grain` of it.
struct Job {
  int64_t count;
  int64_t grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t begin = next.fetch_add(grain); begin < count; begin = next.fetch_add(grain))
      body(context, begin, std::min(begin + grain, count));
  }
};

class Pool {
 public:
  // False when another caller is using the pool; nothing was done then.
  bool run(int helpers, Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    helpers = std::min(helpers, grow_to(helpers));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.work();
    // All pieces are taken. Helpers that never woke are not waited for; those that joined may still be in their last piece.
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  int grow_to(int helpers) {
    try {
      for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: fewer helpers do the same work.
    }
    return size_;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++running_;
      Job& job = *job_;
      lock.unlock();
      job.work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job this is
  int size_ = 0;      // threads started; guarded by owner_
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int wanted_ = 0;   // helpers that may still join the job
  int running_ = 0;  // helpers inside it
};

// Never destroyed: its threads are detached and sleep in it until the process ends. After fork() the child abandons the parent's pool,
// because it has none of its threads and a lock may have been held at the fork.
Pool* pool = new Pool;
#if !defined(_WIN32)
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

}  // namespace

void parallel_for(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  Job job{count, std::max<int64_t>(grain, 1), body, context};
  const int64_t pieces = (count + job.grain - 1) / job.grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers < 1 || !pool->run(helpers, job)) job.work();
}

}  // namespace bip::cpu
