// Work cut into pieces, on a few threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

// Calls work(matrix, begin, end) for pieces of all matrices, on up to `threads` threads; `length` is what is cut.
template <typename Work>
void over_pieces(std::ptrdiff_t matrices, std::ptrdiff_t length, std::ptrdiff_t threads, const Work &work) {
    using std::ptrdiff_t;
    constexpr ptrdiff_t kGrain = 64;
    if (threads <= 1 || matrices == 0) {
        for (ptrdiff_t matrix = 0; matrix < matrices; ++matrix) work(matrix, ptrdiff_t{0}, length);
        return;
    }
    const ptrdiff_t wanted = (4 * threads + matrices - 1) / matrices;
    const ptrdiff_t piece = std::max(kGrain, (length / wanted + kGrain - 1) / kGrain * kGrain);
    const ptrdiff_t pieces = (length + piece - 1) / piece;
    std::atomic<ptrdiff_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    const auto run = [&] {
        try {
            for (ptrdiff_t at; (at = next++) < matrices * pieces;) {
                const ptrdiff_t begin = at % pieces * piece;
                work(at / pieces, begin, std::min(begin + piece, length));
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failing);
            failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    try {
        for (ptrdiff_t count = 1; count < std::min(threads, matrices * pieces); ++count) others.emplace_back(run);
    } catch (const std::system_error &) {
        // No more threads to be had: those there are do it all.
    }
    run();
    for (std::thread &other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}
