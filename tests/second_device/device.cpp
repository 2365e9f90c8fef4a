// A second torch device, on the CPU's memory: what a GPU refuses, it refuses.
//
// Tensors of two devices in one operation are an error (but for numbers and for indices, as under CUDA), and NumPy and
// pickles do not see its memory. Every operation is otherwise computed by the CPU's kernel, so results are the CPU's.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

constexpr auto SECOND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(SECOND, 0);
using Sizes = at::IntArrayRef;
using SymSizes = c10::SymIntArrayRef;
template <class T> using Maybe = std::optional<T>;

struct Memory final : at::Allocator {
  static void release(void* memory) { if (memory) c10::free_cpu(memory); }
  at::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &release, HERE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(SECOND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  const c10::Stream only{c10::Stream::DEFAULT, HERE};
  c10::DeviceType type() const override { return SECOND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only; }
  c10::Stream getNewStream(c10::Device, int) const override { return only; }
  c10::Stream exchangeStream(c10::Stream) const override { return only; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(0); }
  c10::Device getDeviceFromPtr(void*) const override { return HERE; }
};
Hooks hooks;
const bool registered = [] { at::RegisterPrivateUse1HooksInterface(&hooks); return true; }();

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.device() != HERE) return tensor;
  auto* keep = new c10::Storage(tensor.storage());
  auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  at::DataPtr data(const_cast<void*>(keep->data()), keep, release, at::Device(at::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), keep->nbytes(), std::move(data), nullptr, false);
  auto alias = at::empty({0}, at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
  alias.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

at::Tensor here(const at::Tensor& tensor) { return tensor.defined() ? tensor.to(HERE) : tensor; }

at::Tensor empty(Sizes size, Maybe<at::ScalarType> type, Maybe<at::Layout>, Maybe<at::Device>, Maybe<bool>,
                 Maybe<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(Sizes size, Sizes stride, Maybe<at::ScalarType> type, Maybe<at::Layout>, Maybe<at::Device>,
                         Maybe<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(type));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  return copy_from(from, to.resize_(from.sizes()), false);
}

at::Scalar number(const at::Tensor& tensor) { return on_cpu(tensor).item(); }

const at::Tensor& resize(const at::Tensor& tensor, SymSizes sizes, Maybe<at::MemoryFormat> format) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  size_t needed = (c10::multiply_integers(size) + tensor.storage_offset()) * tensor.dtype().itemsize();
  const auto& storage = tensor.storage();
  if (storage.nbytes() < needed) {
    auto larger = memory.allocate(needed);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / tensor.dtype().itemsize());
  return set_storage(tensor, std::move(source), 0, {count}, {1});
}

void same(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "a convolution found tensors on ", a.device(), " and ", b.device());
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const Maybe<at::Tensor>& bias, SymSizes stride,
                       SymSizes padding, SymSizes dilation, bool transposed, SymSizes output_padding, c10::SymInt groups) {
  same(x, weight);
  Maybe<at::Tensor> own;
  if (bias && bias->defined()) {
    same(x, *bias);
    own = on_cpu(*bias);
  }
  return here(at::convolution_symint(on_cpu(x), on_cpu(weight), own, stride, padding, dilation, transposed,
                                     output_padding, std::move(groups)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, SymSizes stride, SymSizes padding,
    SymSizes dilation, bool transposed, SymSizes output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  same(x, weight);
  same(x, gradient);
  std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [a, b, c] = at::convolution_backward_symint(on_cpu(gradient), on_cpu(x), on_cpu(weight), bias, stride, padding,
                                                   dilation, transposed, output_padding, groups, wanted);
  return {here(a), here(b), here(c)};
}

// Whether CUDA, too, takes tensors of the CPU beside its own: copies, and indices into a tensor of the device.
bool may_mix(const std::string& name, const c10::IValue& first) {
  if (name == "aten::copy_") return true;
  bool indexed = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  return indexed && first.isTensor() && first.toTensor().device() == HERE;
}

void on_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  bool own = false, other = false;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    own = own || tensor.device() == HERE;
    other = other || (tensor.device().is_cpu() && tensor.dim() > 0);
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isList())
      for (const c10::IValue& one : value.toList().vec()) if (one.isTensor()) look(one.toTensor());
  }
  TORCH_CHECK(!(own && other) || may_mix(schema.name(), arguments[0]), "Expected all tensors to be on the same device, ",
              "but found at least two devices, ", HERE, " and cpu! (", schema.name(), ")");
  at::native::cpu_fallback(operation, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &number);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}
