/** Tensor programs: recorded by ordinary functions, differentiated, and written as ONNX. */

export * from './attention.ts';
export * from './convolution.ts';
export * from './data.ts';
export { type Dimension, exactQuotient, plus, type Shape, shapeText, symbol, times } from './dimension.ts';
export * from './elementwise.ts';
export { gradients } from './gradient.ts';
export * from './layout.ts';
export * from './linear.ts';
export * from './normalization.ts';
export {
  type Binding,
  leaves,
  type OnnxModel,
  type OnnxOptions,
  OUTPUT_PREFIX,
  type Program,
  writeOnnx,
} from './onnx.ts';
export { dequantize, INT4_BLOCK, type QuantizedPrecision } from './quantized.ts';
export * from './reduction.ts';
export { constant, input, parameter, ShapeError, scalar, size, type Tensor } from './tensor.ts';
