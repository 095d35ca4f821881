// The host has one device and one stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
