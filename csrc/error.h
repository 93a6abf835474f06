// Errors of the core. bindings.cpp turns each into the Python exception of the
// same name.
#pragma once

#include <stdexcept>
#include <string>

namespace mixloader {

// A shard that is missing, truncated or unreadable.
struct ShardError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// No descriptor, or no mapping, is left to open a shard with: fewer may do.
struct TooManyFiles : ShardError {
  using ShardError::ShardError;
};

// A token id outside the vocabulary, or that the output type cannot hold.
struct TokenError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Weights, or a step to apply them at, that cannot be used.
struct WeightsError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A saved state that does not fit this streamer.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace mixloader
