#pragma once

// Stands in for Thrust, of which PyTorch's header for complex numbers needs two names when nvcc reads it and nothing here
// needs any. Thrust itself brings constants whose names hold a hash of the including file's path: the same sources would
// give another library in another folder. It also takes longer to compile than all of ours.
namespace thrust {

template <typename T>
struct complex;

template <typename T>
complex<T> polar(const T& magnitude, const T& angle);

}  // namespace thrust
