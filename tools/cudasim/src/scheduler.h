// What the files of the scheduler share.
#pragma once
#include <memory>

#include "machine.h"

namespace cudasim {

// --- warp_scheduler.cpp
enum class SliceEnd { Budget, Blocked, Polled, Done };
SliceEnd runWarp(Warp& w, int budget);  // executes up to `budget` instructions

// --- residency.cpp
std::unique_ptr<Cluster> makeCluster(Launch& l, uint64_t index);
void retire(Launch& l, size_t i);  // the i-th resident cluster has ended

}  // namespace cudasim
