// How pack stages ask for features. Included like class_scatter_vector.h, by that and
// class_scatter_bfloat16.h.

// Fetches the rows that follow a group into the second-level cache, one whole row after the other: pages and
// the processor's own prefetchers prefer that to a line of each row in turn.
class Prefetcher {
 public:
  Prefetcher(const Group& group, int64_t row_bytes)
      : next_(group.next), row_bytes_(row_bytes), rows_(group.rows) {}

  // Asks for one more line. A pack stage does so at least once for each line that it reads itself.
  void ask() {
    if (row_ == rows_) return;
    __builtin_prefetch(next_[row_] + byte_, 0, 2);
    byte_ += kCacheLine;
    if (byte_ < row_bytes_) return;
    byte_ = 0;
    row_++;
  }

 private:
  const char* const* next_;
  int64_t row_bytes_, byte_ = 0;
  int rows_, row_ = 0;
};
