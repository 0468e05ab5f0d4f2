/**
 * Tensors with values: what goes into a program and comes out of it.
 * Element types keep their file representation: `float16` and `bfloat16` are raw bits in a `Uint16Array`.
 */

export type DType =
  | 'float32'
  | 'float16'
  | 'bfloat16'
  | 'float8e4m3'
  | 'float8e5m2'
  | 'float64'
  | 'int64'
  | 'int32'
  | 'int16'
  | 'int8'
  | 'uint8'
  | 'bool';

export type TypedArray =
  | Float32Array
  | Float64Array
  | BigInt64Array
  | Int32Array
  | Int16Array
  | Int8Array
  | Uint16Array
  | Uint8Array;

/** Row-major values with their shape. */
export interface TensorData {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: TypedArray;
}

/** A `float32` tensor, the type everything outside weight files is computed in. */
export interface FloatTensor extends TensorData {
  readonly dtype: 'float32';
  readonly data: Float32Array;
}

export const bytesPerElement: Record<DType, number> = {
  float32: 4,
  float16: 2,
  bfloat16: 2,
  float8e4m3: 1,
  float8e5m2: 1,
  float64: 8,
  int64: 8,
  int32: 4,
  int16: 2,
  int8: 1,
  uint8: 1,
  bool: 1,
};

export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** Wraps values as a float32 tensor; throws when their number does not fit the shape. */
export function floats(shape: readonly number[], data: Float32Array | readonly number[]): FloatTensor {
  const values = data instanceof Float32Array ? data : Float32Array.from(data);
  if (values.length !== elementCount(shape)) {
    throw new RangeError(`${values.length} values do not fill a tensor of shape [${shape.join(', ')}].`);
  }
  return { dtype: 'float32', shape, data: values };
}

const floatBits = new Float32Array(1);
const intBits = new Uint32Array(floatBits.buffer);

/** IEEE half precision (raw bits) to a number. Exact. */
export function float16ToNumber(bits: number): number {
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  const sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** A number to IEEE half precision (raw bits), rounded to nearest even; overflow gives infinity. */
export function numberToFloat16(value: number): number {
  floatBits[0] = value;
  const bits = intBits[0]!;
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Subnormal half: adding 0.5 lets the float unit round at the right bit.
    floatBits[0] = Math.abs(floatBits[0]!) + 0.5;
    return sign | (intBits[0]! - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
}

/** The values of all codes of a format, made once. */
const decodingTables = new Map<(bits: number) => number, Float32Array>();

function decode(bits: ArrayLike<number>, toNumber: (bits: number) => number, codes: number): Float32Array {
  let table = decodingTables.get(toNumber);
  if (!table) {
    table = Float32Array.from({ length: codes }, (_, code) => toNumber(code));
    decodingTables.set(toNumber, table);
  }
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = table[bits[i]!]!;
  return values;
}

/** The values of any floating or integer tensor as float32. A float32 tensor is returned as it is, without a copy. */
export function toFloat32(tensor: TensorData): Float32Array {
  const { dtype, data } = tensor;
  switch (dtype) {
    case 'float32':
      return data as Float32Array;
    case 'float16':
      return decode(data as Uint16Array, float16ToNumber, 0x10000);
    case 'bfloat16': {
      const values = new Uint32Array(data.length);
      for (let i = 0; i < data.length; i++) values[i] = (data[i] as number) << 16;
      return new Float32Array(values.buffer);
    }
    case 'float8e5m2':
      return decode(data as Uint8Array, float8e5m2ToNumber, 0x100);
    case 'float8e4m3':
      return decode(data as Uint8Array, float8e4m3ToNumber, 0x100);
    default:
      return Float32Array.from(data as ArrayLike<number | bigint>, Number);
  }
}

/** E5M2 is the upper half of a half-precision number. */
function float8e5m2ToNumber(bits: number): number {
  return float16ToNumber(bits << 8);
}

/** E4M3 without infinities (the "fn" variant): exponent bias 7, only 0x7f and 0xff are NaN. */
function float8e4m3ToNumber(bits: number): number {
  const exponent = (bits >> 3) & 0xf;
  const fraction = bits & 7;
  const sign = bits & 0x80 ? -1 : 1;
  if ((bits & 0x7f) === 0x7f) return Number.NaN;
  return exponent === 0 ? sign * fraction * 2 ** -9 : sign * (1 + fraction / 8) * 2 ** (exponent - 7);
}

/** Rounds float32 values to half precision (raw bits), to nearest even. */
export function toFloat16(values: Float32Array): Uint16Array {
  const bits = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) bits[i] = numberToFloat16(values[i]!);
  return bits;
}
