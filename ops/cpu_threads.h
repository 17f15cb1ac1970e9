// parallel(count, function): function(0), function(1), ... on several threads.
//
// Work is cut into units that threads claim one by one: a thread that the system has put to sleep claims none. A
// waiting thread looks for work for SPIN_US and then sleeps. Where another process takes a core away in the middle of a
// unit, the others would wait for milliseconds; then the caller works alone for a while.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int64_t SPIN_US = 60, STALL_US = 400, ALONE_US = 20000, MAX_ALONE_US = 1000000;

inline int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

struct Pool {
    std::atomic<uint64_t> ticket{0};  // the job's number << 32 | the next unit: a claim is for this job or fails
    std::atomic<uint32_t> job{0};  // what sleeping threads wait for
    std::atomic<int64_t> units{0}, finished{0};
    std::atomic<void (*)(const void*, int64_t)> work{nullptr};
    std::atomic<const void*> about{nullptr};
    std::atomic<int> sleeping{0};
    std::mutex busy;
    int threads = 1;  // the caller's included
    int started = 1;
    int64_t alone_until = 0, alone_us = ALONE_US;

    void claim(uint32_t number) {
        for (;;) {
            uint64_t at = ticket.load();
            int64_t unit = (uint32_t)at;
            auto function = work.load();
            auto data = about.load();
            if (at >> 32 != number || unit >= units.load()) return;
            if (!ticket.compare_exchange_weak(at, at + 1)) continue;  // else what was read is this job's
            function(data, unit);
            finished.fetch_add(1);
        }
    }

    void serve() {
        uint32_t seen = 0;
        for (;;) {
            int64_t end = now_us() + SPIN_US;
            while (job.load() == seen && now_us() < end)
                for (int i = 0; i < 16; i++) relax();
            if (job.load() == seen) {
                sleeping.fetch_add(1);
                job.wait(seen);
                sleeping.fetch_sub(1);
            }
            seen = job.load();
            claim(seen);
        }
    }

    void run(int64_t count, void (*function)(const void*, int64_t), const void* data) {
        std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
        if (threads == 1 || count == 1 || !lock.owns_lock() || (alone_until && now_us() < alone_until)) {
            for (int64_t unit = 0; unit < count; unit++) function(data, unit);
            return;
        }
        while (started < threads) {
            std::thread(&Pool::serve, this).detach();
            started++;
        }
        uint32_t number = job.load() + 1;
        ticket.store((uint64_t)number << 32 | UINT32_MAX);  // nobody claims while the job is described
        units.store(count);
        work.store(function);
        about.store(data);
        finished.store(0);
        ticket.store((uint64_t)number << 32);
        job.store(number);
        if (sleeping.load()) job.notify_all();
        claim(number);
        if (finished.load() == count) return;
        int64_t start = now_us(), waited = 0;
        while (finished.load() != count) {
            relax();
            waited = now_us() - start;
            if (waited > SPIN_US) std::this_thread::yield();
        }
        if (waited > STALL_US) {  // each further stall soon after the last doubles the time alone
            int64_t now = now_us();
            alone_us = now - alone_until < 2 * alone_us ? std::min(2 * alone_us, MAX_ALONE_US) : ALONE_US;
            alone_until = now + alone_us;
        }
    }
};

Pool& pool = *new Pool;  // never freed: its threads end with the process

template <class Function> void parallel(int64_t count, const Function& function) {
    pool.run(count, [](const void* f, int64_t unit) { (*(const Function*)f)(unit); }, &function);
}
