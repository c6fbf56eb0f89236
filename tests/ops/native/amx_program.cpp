// What test_amx_emulator.py runs: tile intrinsics on operands from standard input, results to standard output.
// The first argument chooses what is done: `products`, `forms`, `fault` or `chained`.

#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

extern "C" {
__attribute__((weak, visibility("default"))) int everlong_amx_emulated();
__attribute__((weak, visibility("default"))) uint64_t everlong_amx_executed();

// Written in assembly by the test: each loads a tile by another way of addressing, and stores it with 64 bytes a row.
extern void (*const addressing_forms[])(const void* first_row, long stride, void* out);
extern const long addressing_form_count;
}

static bool amx_available() {
  static const bool available =
      (everlong_amx_emulated && everlong_amx_emulated()) || syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return available;
}

using Bytes = std::vector<uint8_t>;

static Bytes read_bytes(size_t count) {
  Bytes bytes(count);
  if (fread(bytes.data(), 1, count, stdin) != count) _exit(3);
  return bytes;
}

static void write_bytes(const Bytes& bytes) {
  if (fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size()) _exit(3);
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC 12's intrinsic names 8 of the 64 bytes as read.
static void load_configuration(const void* configuration) {
  asm volatile("" ::: "memory");
  _tile_loadconfig(configuration);
}

struct Case {
  int32_t rows, pairs, columns, left_stride, right_stride, out_stride, repetitions;
  Bytes left, right, out, from_new, from_zero, configuration;
};

static Case read_case() {
  Case one{};
  const Bytes header = read_bytes(7 * sizeof(int32_t));
  memcpy(&one.rows, header.data(), header.size());
  const auto size = [](int rows, int stride, int row_bytes) { return size_t((rows - 1) * stride + row_bytes); };
  one.left = read_bytes(size(one.rows, one.left_stride, 4 * one.pairs));
  one.right = read_bytes(size(one.pairs, one.right_stride, 4 * one.columns));
  one.out = read_bytes(size(one.rows, one.out_stride, 4 * one.columns));
  one.from_new = one.from_zero = Bytes(16 * 64, 0xAB);
  one.configuration = Bytes(64, 0xAB);
  return one;
}

static void multiply(Case& one) {
  Configuration shapes;
  const int rows[] = {one.rows, one.rows, one.pairs, one.rows};
  const int row_bytes[] = {4 * one.columns, 4 * one.pairs, 4 * one.columns, 4 * one.columns};
  for (int tile = 0; tile < 4; ++tile) {
    shapes.rows[tile] = uint8_t(rows[tile]);
    shapes.row_bytes[tile] = uint16_t(row_bytes[tile]);
  }
  load_configuration(&shapes);
  asm volatile("" ::: "memory");
  _tile_loadd(0, one.out.data(), one.out_stride);
  _tile_loadd(1, one.left.data(), one.left_stride);
  _tile_stream_loadd(2, one.right.data(), one.right_stride);
  for (int i = 0; i < one.repetitions; ++i) _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, one.out.data(), one.out_stride);
  _tile_zero(0);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, one.from_zero.data(), 64);
  _tile_dpbf16ps(3, 1, 2);
  _tile_stored(3, one.from_new.data(), 64);
  _tile_storeconfig(one.configuration.data());
  _tile_release();
}

// Two threads side by side, each with tiles of its own shapes, and with a rounding mode that the products ignore.
static int products() {
  std::vector<Case> cases;
  const Bytes header = read_bytes(sizeof(int32_t));
  int32_t count;
  memcpy(&count, header.data(), sizeof count);
  for (int i = 0; i < count; ++i) cases.push_back(read_case());
  bool kept[2];
  const auto work = [&](size_t thread) {
    const unsigned towards_zero = _mm_getcsr() | 0x6000;
    _mm_setcsr(towards_zero);
    for (size_t i = thread; i < cases.size(); i += 2) multiply(cases[i]);
    kept[thread] = _mm_getcsr() == towards_zero;
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  for (const Case& one : cases) {
    write_bytes(one.out);
    write_bytes(one.from_new);
    write_bytes(one.from_zero);
    write_bytes(one.configuration);
  }
  if (everlong_amx_executed) fprintf(stderr, "%llu", static_cast<unsigned long long>(everlong_amx_executed()));
  return kept[0] && kept[1] ? 0 : 4;
}

// Standard input holds the stride and the data; the first row lies in the middle, so that a stride may be negative.
static int forms() {
  const Bytes header = read_bytes(sizeof(int64_t));
  long stride;
  memcpy(&stride, header.data(), sizeof stride);
  const Bytes data = read_bytes(4096);
  void* const low = mmap(reinterpret_cast<void*>(0x10000000), 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (low == MAP_FAILED) return 3;
  memcpy(low, data.data(), data.size());
  Bytes out(1024);
  for (long i = 0; i < addressing_form_count; ++i) {
    addressing_forms[i](data.data() + 2048, stride, out.data());
    write_bytes(out);
  }
  return 0;
}

// Standard input holds a configuration, of palette 255 for none; the second argument says what is done under it.
static int fault(const std::string& action) {
  const Bytes configuration = read_bytes(64);
  if (configuration[0] != 255) load_configuration(configuration.data());
  if (action == "zero") _tile_zero(0);
  if (action == "zero 5") _tile_zero(5);
  if (action == "multiply") _tile_dpbf16ps(0, 1, 2);
  // tdpbf16ps tmm0, tmm1, tmm1, which the assembler refuses to write
  if (action == "square") asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");
  if (action == "release") {
    _tile_release();
    _tile_zero(0);
  }
  if (action == "other") __builtin_trap();
  return 0;
}

static void on_illegal_instruction(int) { _exit(7); }

// A handler that came after the emulator was loaded: it gets what is not the emulator's, and nothing else.
static int chained() {
  signal(SIGILL, on_illegal_instruction);
  if (!amx_available()) return 2;
  load_configuration(read_bytes(64).data());
  _tile_zero(0);
  _tile_release();
  __builtin_trap();
}

int main(int, char** arguments) {
  const std::string action = arguments[1];
  if (action == "chained") return chained();
  if (!amx_available()) return 2;
  if (action == "products") return products();
  return action == "forms" ? forms() : fault(arguments[2]);
}
