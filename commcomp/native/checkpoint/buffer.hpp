// Bytes whose memory is neither zeroed nor given back between uses: fresh pages cost as much as what is written to them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(COMMCOMP_WATCH_BUFFERS)
#include <sanitizer/asan_interface.h>
#endif

namespace checkpoint {

class Buffer {
  public:
    std::uint8_t *data() { return data_.get(); }

    // Room for `more` bytes after the first `used`, which are kept.
    std::uint8_t *room(std::size_t used, std::size_t more) {
        if (used + more > capacity_) {
            const std::size_t capacity = std::max(2 * capacity_, used + more);
            std::unique_ptr<std::uint8_t[]> larger(new std::uint8_t[capacity]);
            if (used > 0) std::memcpy(larger.get(), data_.get(), used);
            data_ = std::move(larger);
            capacity_ = capacity;
        }
        watch(used + more);
        return data_.get();
    }

  private:
    // To the address sanitizer what lies beyond is not there, though it was when the memory was used before.
    void watch([[maybe_unused]] std::size_t size) {
#if defined(COMMCOMP_WATCH_BUFFERS)
        ASAN_UNPOISON_MEMORY_REGION(data_.get(), size);
        ASAN_POISON_MEMORY_REGION(data_.get() + size, capacity_ - size);
#endif
    }

    std::unique_ptr<std::uint8_t[]> data_;
    std::size_t capacity_ = 0;
};

// Bytes in a buffer, to which more can be added.
class Output {
  public:
    Output(Buffer &buffer) : buffer_(buffer) {}

    std::uint8_t *data() { return buffer_.data(); }
    std::size_t size() const { return size_; }

    void add(const void *bytes, std::size_t count) {
        if (count == 0) return;
        std::memcpy(buffer_.room(size_, count) + size_, bytes, count);
        size_ += count;
    }

    // `count` bytes more, for the caller to fill.
    std::uint8_t *grow(std::size_t count) {
        std::uint8_t *const place = buffer_.room(size_, count) + size_;
        size_ += count;
        return place;
    }

    void resize(std::size_t size) { size_ = size; }
    Buffer &buffer() { return buffer_; }

  private:
    Buffer &buffer_;
    std::size_t size_ = 0;
};

}  // namespace checkpoint
