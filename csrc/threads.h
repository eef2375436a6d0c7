// Threads: a parallel region over the OpenMP runtime the process has already loaded (torch's), or over threads of our
// own.
//
// Sharing torch's workers matters: two pools that spin would fight for the same cores between every matmul and every
// step.
#pragma once

#include <atomic>
#include <cstdint>

namespace louver {

// The threads of one region. Every member is called by all of them.
class Team {
  public:
    explicit Team(int size) : size_(size) {}
    int size() const { return size_; }
    void barrier();

  private:
    int size_;
    std::atomic<int> arrived_{0};
    std::atomic<int> generation_{0};
};

using TeamFunction = void (*)(void* context, int rank, Team& team);

// Run function on up to num_threads threads; returns when all are done. The team may be smaller than asked for.
void parallel(int num_threads, TeamFunction function, void* context);

// "openmp" or "own": where parallel() gets its threads from.
const char* thread_source();

// Memory of the calling thread, kept between calls: at least bytes, 64-byte aligned. One user at a time.
char* scratch(int64_t bytes);

}  // namespace louver
