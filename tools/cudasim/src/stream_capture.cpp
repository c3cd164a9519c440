#include "stream_capture.h"

#include "../cudasim.h"

#include <set>
#include <vector>

#include "runtime.h"

namespace cudasim {
namespace {

constexpr int kCaptureUnsupported = 900, kCaptureInvalidated = 901, kCaptureUnmatched = 903, kIllegalState = 401;

struct Graph {
  std::vector<std::function<int()>> work;
};
struct Capture {
  bool active = false, spoiled = false;
  void* origin = nullptr;
  std::set<void*> streams, events;
  Graph* graph = nullptr;
};
Capture g_capture;
constexpr int kRelaxed = 2;
thread_local int tlCaptureMode = 0;  // of cudaThreadExchangeStreamCaptureMode

int beginCapture(void* stream) {
  if (g_capture.active) return fail(kIllegalState);
  g_capture = Capture();
  g_capture.active = true;
  g_capture.origin = stream;
  g_capture.streams = {stream};
  g_capture.graph = new Graph;
  return kSuccess;
}

}  // namespace

bool capturing(void* stream) {
  return g_capture.active && g_capture.streams.count(stream);
}
int onStream(void* stream, std::function<int()> work) {
  if (!capturing(stream)) return work();
  if (g_capture.spoiled) return fail(kCaptureInvalidated);
  g_capture.graph->work.push_back(std::move(work));
  return kSuccess;
}
int refuseInCapture() {
  if (!g_capture.active || tlCaptureMode == kRelaxed) return kSuccess;
  g_capture.spoiled = true;
  return fail(kCaptureUnsupported);
}
void captureEvent(void* event, void* stream) {
  if (capturing(stream))
    g_capture.events.insert(event);
  else
    g_capture.events.erase(event);
}
void captureWait(void* stream, void* event) {
  if (g_capture.active && g_capture.events.count(event)) g_capture.streams.insert(stream);
}

}  // namespace cudasim

using namespace cudasim;

extern "C" {

int cudaStreamBeginCapture(void* stream, int) {
  return stream ? beginCapture(stream) : fail(kCaptureUnsupported);  // the legacy stream
}
int cudaStreamBeginCapture_ptsz(void* s, int mode) {
  return cudaStreamBeginCapture(s, mode);
}
int cudaStreamEndCapture(void* stream, void** graph) {
  *graph = nullptr;
  if (!g_capture.active || g_capture.origin != stream)
    return fail(g_capture.active ? kCaptureUnmatched : kIllegalState);
  Capture c = std::move(g_capture);
  g_capture = Capture();
  if (c.spoiled) {
    delete c.graph;
    return fail(kCaptureInvalidated);
  }
  *graph = c.graph;
  return kSuccess;
}
int cudaStreamEndCapture_ptsz(void* s, void** g) {
  return cudaStreamEndCapture(s, g);
}
int cudaStreamIsCapturing(void* stream, int* status) {
  *status = !capturing(stream) ? 0 : g_capture.spoiled ? 2 : 1;
  return kSuccess;
}
int cudaStreamIsCapturing_ptsz(void* stream, int* status) {
  return cudaStreamIsCapturing(stream, status);
}
int cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, tlCaptureMode);
  return kSuccess;
}
int cudaGraphInstantiate(void** exec, void* graph, unsigned long long) {
  *exec = new Graph(*(Graph*)graph);
  return kSuccess;
}
int cudaGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long f) {
  return cudaGraphInstantiate(exec, graph, f);
}
int cudaGraphUpload(void*, void*) {
  return kSuccess;
}
int cudaGraphUpload_ptsz(void*, void*) {
  return kSuccess;
}
int cudaGraphLaunch(void* exec, void* stream) {
  if (capturing(stream)) return fail(refuseInCapture());  // child graphs are not modelled
  for (auto& w : ((Graph*)exec)->work)
    if (int e = w()) return e;
  return kSuccess;
}
int cudaGraphLaunch_ptsz(void* exec, void* stream) {
  return cudaGraphLaunch(exec, stream);
}
int cudaGraphDestroy(void* graph) {
  delete (Graph*)graph;
  return kSuccess;
}
int cudasim_capture_begin(void) {
  return beginCapture(nullptr);
}
int cudasim_capture_end(void** graph) {
  return cudaStreamEndCapture(nullptr, graph);
}
int cudasim_graph_launch(void* graph) {
  return cudaGraphLaunch(graph, nullptr);
}
void cudasim_graph_destroy(void* graph) {
  cudaGraphDestroy(graph);
}
int cudaGraphExecDestroy(void* exec) {
  delete (Graph*)exec;
  return kSuccess;
}

}  // extern "C"
