// As NVIDIA's driver, its runtime and NVRTC behave on a machine with one GPU, on a CPU instead.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

using u64 = uint64_t;
struct dim3 { unsigned x, y, z; };
struct Place { dim3 thread, block, threads, blocks; unsigned lane, count; };

extern "C" {
Place emulated_place;

// ---- fibers
void emulated_switch(void **save, void *load);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
emulated_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
}

namespace {
constexpr size_t STACK = 64 << 10;
struct Fiber { void *sp; bool done; dim3 at; unsigned lane; };
std::vector<Fiber> fibers;
std::vector<char> stacks;
std::vector<u64> slots(1024);
void *home;
unsigned current, living, arrived, generation;
void (*entry)(void **);
void **values;

void leave() { emulated_switch(&fibers[current].sp, home); }
void body() {
  entry(values);
  fibers[current].done = true;
  --living;
  if (arrived && arrived == living) { arrived = 0; ++generation; }
  leave();
  abort();
}
void block(dim3 threads) {
  unsigned n = threads.x * threads.y * threads.z;
  fibers.assign(n, {});
  stacks.resize(n * STACK);
  living = n; arrived = 0;
  for (unsigned i = 0; i < n; ++i) {
    void **top = (void **)(((u64)&stacks[(i + 1) * STACK - 64]) & ~u64(15));
    *--top = nullptr;
    *--top = (void *)body;
    top -= 6;
    fibers[i] = {top, false, {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y}, i};
  }
  while (living)
    for (current = 0; current < n; ++current)
      if (!fibers[current].done) {
        emulated_place.thread = fibers[current].at;
        emulated_place.lane = current;
        emulated_switch(&home, fibers[current].sp);
      }
}

// ---- memory of the GPU, which the host does not see but through calls and kernels
constexpr u64 BASE = 0x200000000000, ROOM = 1ull << 33, PARTS = 4;
void *room() { // each of the libraries takes a part of its own
  for (u64 i = 0; i < PARTS; ++i) {
    void *at = mmap((void *)(BASE + i * ROOM), ROOM, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != MAP_FAILED) return at;
  }
  abort();
}
std::map<u64, size_t> taken;
std::multimap<size_t, u64> given_back;
u64 next;
u64 take(size_t size) {
  if (!next) next = (u64)room();
  size = (size + 256) / 256 * 256;
  auto found = given_back.find(size);
  u64 at = next;
  if (found == given_back.end()) next += size;
  else { at = found->second; given_back.erase(found); }
  taken[at] = size;
  return at;
}
int give_back(u64 at) {
  auto found = taken.find(at);
  if (found == taken.end()) return at ? 1 : 0;
  given_back.emplace(found->second, at);
  taken.erase(found);
  return 0;
}
struct Access {
  static void set(int rights) {
    for (u64 i = 0; i < PARTS; ++i) mprotect((void *)(BASE + i * ROOM), ROOM, rights);
  }
  Access() { set(PROT_READ | PROT_WRITE); }
  ~Access() { set(PROT_NONE); }
};
int copy(void *to, const void *from, size_t size) {
  Access access;
  memmove(to, from, size);
  return 0;
}
} // namespace

extern "C" {
void emulated_yield() { leave(); }
u64 *emulated_slots() { return slots.data(); }
void emulated_barrier() {
  unsigned mine = generation;
  if (++arrived == living) { arrived = 0; ++generation; leave(); return; }
  while (mine == generation) leave();
}

// ---- driver
struct Launch { unsigned gx, gy, gz, bx, by, bz, shared; void *stream, *attributes; unsigned count; };
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int) { *d = 0; return 0; }
int cuDeviceGetName(char *name, int n, int) { snprintf(name, n, "emulated"); return 0; }
static int attribute(int *v, int a) {
  *v = a == 1 ? 1024 : a == 10 ? 32 : a == 75 ? 8 : a == 76 ? 9 : a == 97 ? 101376 : 0;
  return 0;
}
int cuDeviceGetAttribute(int *v, int a, int) { return attribute(v, a); }
int cuDevicePrimaryCtxRetain(void **c, int) { *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = *t = 1ull << 34; return 0; }
int cuMemAlloc_v2(u64 *p, size_t n) { *p = take(n); return 0; }
int cuMemFree_v2(u64 p) { return give_back(p); }
int cuMemcpyHtoD_v2(u64 d, const void *s, size_t n) { return copy((void *)d, s, n); }
int cuMemcpyDtoH_v2(void *d, u64 s, size_t n) { return copy(d, (void *)s, n); }
int cuStreamCreate(void **s, unsigned) { *s = (void *)1; return 0; }
int cuStreamDestroy_v2(void *) { return 0; }
int cuStreamSynchronize(void *) { return 0; }
int cuEventCreate(void **e, unsigned) { *e = new u64; return 0; }
int cuEventRecord(void *e, void *) {
  *(u64 *)e = std::chrono::steady_clock::now().time_since_epoch().count();
  return 0;
}
int cuEventSynchronize(void *) { return 0; }
int cuEventElapsedTime(float *ms, void *a, void *b) { *ms = (*(u64 *)b - *(u64 *)a) / 1e6; return 0; }
int cuEventElapsedTime_v2(float *ms, void *a, void *b) { return cuEventElapsedTime(ms, a, b); }
int cuEventDestroy_v2(void *e) { delete (u64 *)e; return 0; }
int cuGetErrorName(int, const char **s) { *s = "CUDA_ERROR_EMULATED"; return 0; }
int cuGetErrorString(int, const char **s) { *s = "an error of the emulator"; return 0; }
int cuFuncSetAttribute(void *, int, int) { return 0; }
int cuTensorMapEncodeTiled() { return 801; }
int cuModuleUnload(void *) { return 0; }
int cuModuleLoadData(void **module, const void *image) {
  auto head = (const Elf64_Ehdr *)image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG)) return 200;
  Dl_info here;
  if (dladdr((void *)cuInit, &here)) dlopen(here.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  char name[] = "/tmp/emulated-XXXXXX";
  int file = mkstemp(name);
  size_t size = head->e_shoff + head->e_shnum * head->e_shentsize;
  if (write(file, image, size) != (ssize_t)size) return 200;
  *module = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  unlink(name);
  if (!*module) fprintf(stderr, "%s\n", dlerror());
  close(file);
  return *module ? 0 : 200;
}
int cuModuleGetFunction(void **f, void *module, const char *name) {
  *f = dlsym(module, (std::string(name) + "__entry").c_str());
  return *f ? 0 : 500;
}
int cuLaunchKernelEx(const Launch *l, void *f, void **arguments, void **) {
  if (l->bx * l->by * l->bz > 1024 || !l->gx || !l->gy || !l->gz || l->gy > 65535 || l->gz > 65535)
    return 1;
  if (l->shared > 101376) return 1;
  Access access;
  entry = (void (*)(void **))f;
  values = arguments;
  emulated_place.threads = {l->bx, l->by, l->bz};
  emulated_place.blocks = {l->gx, l->gy, l->gz};
  emulated_place.count = l->bx * l->by * l->bz;
  for (unsigned z = 0; z < l->gz; ++z)
    for (unsigned y = 0; y < l->gy; ++y)
      for (unsigned x = 0; x < l->gx; ++x) {
        emulated_place.block = {x, y, z};
        block(emulated_place.threads);
      }
  return 0;
}

// ---- runtime
int cudaDeviceGetAttribute(int *v, int a, int) { return attribute(v, a); }
int cudaEventCreate(void **e) { return cuEventCreate(e, 0); }
int cudaEventDestroy(void *e) { return cuEventDestroy_v2(e); }
int cudaEventElapsedTime(float *ms, void *a, void *b) { return cuEventElapsedTime(ms, a, b); }
int cudaEventRecord(void *e, void *s) { return cuEventRecord(e, s); }
int cudaEventSynchronize(void *) { return 0; }
int cudaMalloc(void **p, size_t n) { return cuMemAlloc_v2((u64 *)p, n); }
int cudaFree(void *p) { return give_back((u64)p); }
int cudaMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDeviceProperties(void *, int) { return 801; }
const char *cudaGetErrorName(int) { return "cudaErrorEmulated"; }
const char *cudaGetErrorString(int) { return "an error of the emulator"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaGraphDestroy(void *) { return 801; }
int cudaGraphExecDestroy(void *) { return 801; }
int cudaGraphInstantiate(void *) { return 801; }
int cudaGraphLaunch(void *) { return 801; }
int cudaMemGetInfo(size_t *f, size_t *t) { return cuMemGetInfo_v2(f, t); }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int, void *) { return copy(d, s, n); }
int cudaMemcpyPeerAsync(void *d, int, const void *s, int, size_t n, void *) { return copy(d, s, n); }
int cudaStreamBeginCapture(void *, int) { return 801; }
int cudaStreamEndCapture(void *, void *) { return 801; }
int cudaStreamCreate(void **s) { return cuStreamCreate(s, 0); }
int cudaStreamCreateWithFlags(void **s, unsigned) { return cuStreamCreate(s, 0); }
int cudaStreamDestroy(void *) { return 0; }
int cudaStreamSynchronize(void *) { return 0; }
int cudaStreamWaitEvent(void *, void *, unsigned) { return 0; }

// ---- NVRTC
struct Program { std::string source, log, binary; };
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
const char *nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "?"; }
int nvrtcCreateProgram(Program **p, const char *source, const char *, int, const char *const *,
                       const char *const *) {
  *p = new Program{source, "", ""};
  return 0;
}
int nvrtcDestroyProgram(Program **p) { delete *p; return 0; }
int nvrtcCompileProgram(Program *p, int count, const char *const *options) {
  char folder[] = "/tmp/emulated-XXXXXX";
  std::string at = mkdtemp(folder), line;
  std::set<std::string> names;
  std::string text = std::regex_replace(
      p->source, std::regex("__shared__ (alignas\\(\\d+\\))"), "$1 __shared__");
  text = std::regex_replace(text, std::regex("extern (alignas\\(\\d+\\)) __shared__"), "extern $1");
  std::regex head(R"re(extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\()re");
  for (auto i = std::sregex_iterator(text.begin(), text.end(), head); i != std::sregex_iterator(); ++i)
    names.insert((*i)[1]);
  std::ofstream(at + "/cuda.h");
  for (auto empty : {"/cuda_fp16.h", "/cuda_bf16.h", "/math_constants.h"}) std::ofstream(at + empty);
  std::ofstream out(at + "/k.cpp");
  out << "#include \"" << getenv("EMULATED_CUDA_HEADER") << "\"\n" << text << "\n";
  for (auto &name : names)
    out << "extern \"C\" void " << name << "__entry(void **v) { emulated_call(" << name << ", v); }\n";
  out.close();
  std::string command = "g++ -std=c++20 -O0 -w -shared -fPIC -ffp-contract=off -I" + at + " -o " + at +
                        "/k.so " + at + "/k.cpp 2> " + at + "/log";
  int code = system(command.c_str());
  auto read = [&](const char *name) {
    std::ifstream file(at + name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  p->log = read("/log");
  p->binary = read("/k.so");
  if (system(("rm -r " + at).c_str())) return 5;
  return code ? 6 : 0;
}
int nvrtcGetProgramLogSize(Program *p, size_t *n) { *n = p->log.size() + 1; return 0; }
int nvrtcGetProgramLog(Program *p, char *to) { memcpy(to, p->log.c_str(), p->log.size() + 1); return 0; }
int nvrtcGetCUBINSize(Program *p, size_t *n) { *n = p->binary.size(); return 0; }
int nvrtcGetCUBIN(Program *p, char *to) { memcpy(to, p->binary.data(), p->binary.size()); return 0; }
int nvrtcGetPTXSize(Program *p, size_t *n) { return nvrtcGetCUBINSize(p, n); }
int nvrtcGetPTX(Program *p, char *to) { return nvrtcGetCUBIN(p, to); }
}
