// A file that is cut while it is mapped kills the process that reads there
// (SIGBUS). Work on a map runs under a guard that turns that into an answer.
#pragma once

#include <cstddef>
#include <span>

namespace mixloader {

// Installs the handler of SIGBUS, before that of anyone else who installed one
// since. Faults that are not ours go on to the handler before. To be called
// after each mmap.
void guard_against_sigbus();

// Runs work(argument), which reads `map` and must need no clean-up: if memory
// of the map is gone, it is left where it stands, and the result is false.
bool survives(std::span<const std::byte> map, void (*work)(void*),
              void* argument);

}  // namespace mixloader
