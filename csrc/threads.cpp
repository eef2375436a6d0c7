#include "threads.h"

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define LOUVER_HAS_DLSYM 1
#endif

namespace louver {
namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin for a while, then let others have the core: there may be more threads than free cores.
template <class Done>
void wait_until(Done done) {
    for (int spins = 0; !done(); ++spins) {
        if (spins < 4096) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

struct Region {
    TeamFunction function;
    void* context;
    std::atomic<Team*> team{nullptr};
    int (*team_size)() = nullptr;
    int (*rank)() = nullptr;
};

// The libgomp interface, which LLVM's runtime offers too.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*num_threads)() = nullptr;
    int (*thread_num)() = nullptr;
};

const OpenMp* find_openmp() {
    static const OpenMp found = [] {
        OpenMp api;
#ifdef LOUVER_HAS_DLSYM
        api.parallel = reinterpret_cast<decltype(api.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        api.num_threads = reinterpret_cast<decltype(api.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
        api.thread_num = reinterpret_cast<decltype(api.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
        return api;
    }();
    return found.parallel && found.num_threads && found.thread_num ? &found : nullptr;
}

void run_openmp_member(void* argument) {
    auto* region = static_cast<Region*>(argument);
    const int rank = region->rank(), size = region->team_size();
    Team* team = nullptr;
    if (rank == 0) {
        team = new Team(size);  // the runtime decides how many come
        region->team.store(team, std::memory_order_release);
    } else {
        wait_until([&] { return (team = region->team.load(std::memory_order_acquire)) != nullptr; });
    }
    region->function(region->context, rank, *team);
}

// Threads of our own, for a process without OpenMP. One region at a time; a second caller works alone.
class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    bool run(int num_threads, TeamFunction function, void* context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        Team team(num_threads);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < num_threads - 1) {
                const int rank = static_cast<int>(threads_.size()) + 1;
                threads_.emplace_back([this, rank, seen = round_] { work(rank, seen); });
            }
            function_ = function, context_ = context, team_ = &team;
            pending_ = num_threads - 1;
            ++round_;
        }
        wake_.notify_all();
        function(context, 0, team);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        return true;
    }

  private:
    void work(int rank, int64_t seen) {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
            if (stopping_) return;
            seen = round_;
            Team* team = team_;
            if (rank >= team->size()) continue;
            auto* function = function_;
            void* context = context_;
            lock.unlock();
            function(context, rank, *team);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    TeamFunction function_ = nullptr;
    void* context_ = nullptr;
    Team* team_ = nullptr;
    int64_t round_ = 0;
    int pending_ = 0;
    bool stopping_ = false;
};

}  // namespace

void Team::barrier() {
    if (size_ == 1) return;
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
}

void parallel(int num_threads, TeamFunction function, void* context) {
    if (num_threads > 1) {
        if (const OpenMp* openmp = find_openmp()) {
            Region region{function, context, {}, openmp->num_threads, openmp->thread_num};
            openmp->parallel(run_openmp_member, &region, static_cast<unsigned>(num_threads), 0);
            delete region.team.load();
            return;
        }
        static Pool* pool = new Pool();  // never destroyed: workers may outlive static destructors
        if (pool->run(num_threads, function, context)) return;
    }
    Team alone(1);
    function(context, 0, alone);
}

const char* thread_source() { return find_openmp() != nullptr ? "openmp" : "own"; }

char* scratch(int64_t bytes) {
    struct Free {
        void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<char[], Free> memory;
    thread_local int64_t held = 0;
    if (bytes > held) {
        memory.reset();
        held = bytes + bytes / 4;
        memory.reset(static_cast<char*>(::operator new[](static_cast<size_t>(held), std::align_val_t{64})));
    }
    return memory.get();
}

}  // namespace louver
