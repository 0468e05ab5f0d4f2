/**
 * Symbolic tensors. A tensor is the result of an operation on other tensors; building one computes nothing, it
 * records. Shapes and types are checked while recording, so a mistake shows where the model is written.
 */

import type { DType, TensorData, TypedArray } from './data.ts';
import { type Dimension, dimensionText, type Shape, sameDimension, shapeText } from './dimension.ts';
import type { OnnxWriter } from './onnx.ts';

export type AttributeValue = number | string | readonly number[] | Shape;
export type Attributes = Readonly<Record<string, AttributeValue>>;

/** What computes a tensor: how it is written as ONNX and how it is differentiated. */
export interface Operation {
  /** ONNX operator name, also the name in error messages. */
  readonly name: string;
  /** ONNX operator domain; the standard one when left out. */
  readonly domain?: string;
  /** Reads a few rows of a table that may be large: best done in main memory, where the table's file is mapped. */
  readonly lookup?: true;
  /**
   * Gradients of the inputs given the gradient of the output, in the order of the inputs; `undefined` for inputs
   * without one (indices, masks).
   */
  gradient?(output: Tensor, upstream: Tensor): readonly (Tensor | undefined)[];
  /** Writes the operation where a plain ONNX node with the same inputs and attributes does not do. */
  write?(output: Tensor, inputs: readonly string[], writer: OnnxWriter): string;
}

export interface Tensor {
  readonly operation: Operation;
  readonly inputs: readonly Tensor[];
  readonly attributes: Attributes;
  readonly dtype: DType;
  readonly shape: Shape;
  /** Name of an input or parameter. */
  readonly name?: string;
  /** Values of a constant. */
  readonly values?: TypedArray;
}

/** A mistake in building a program: operands that do not fit each other. */
export class ShapeError extends Error {
  override readonly name = 'ShapeError';
}

const INPUT: Operation = { name: 'input' };
const PARAMETER: Operation = { name: 'parameter' };
const CONSTANT: Operation = { name: 'constant' };

/** A value given at each run. */
export function input(name: string, dtype: DType, shape: Shape): Tensor {
  return { operation: INPUT, inputs: [], attributes: {}, dtype, shape, name };
}

/** A weight: bound once when the program is compiled, or given at each run when it is being trained. */
export function parameter(name: string, dtype: DType, shape: readonly number[]): Tensor {
  return { operation: PARAMETER, inputs: [], attributes: {}, dtype, shape, name };
}

/** Values fixed in the program. */
export function constant({ dtype, shape, data }: TensorData): Tensor {
  return { operation: CONSTANT, inputs: [], attributes: {}, dtype, shape, values: data };
}

/** A float32 scalar constant. */
export function scalar(value: number): Tensor {
  return constant({ dtype: 'float32', shape: [], data: Float32Array.of(value) });
}

export function isInput(tensor: Tensor): boolean {
  return tensor.operation === INPUT;
}
export function isParameter(tensor: Tensor): boolean {
  return tensor.operation === PARAMETER;
}
export function isConstant(tensor: Tensor): boolean {
  return tensor.operation === CONSTANT;
}

/** Records an operation. */
export function record(
  operation: Operation,
  inputs: readonly Tensor[],
  shape: Shape,
  options: { dtype?: DType; attributes?: Attributes } = {},
): Tensor {
  return { operation, inputs, attributes: options.attributes ?? {}, dtype: options.dtype ?? inputs[0]!.dtype, shape };
}

/** Throws a {@link ShapeError} that names the operation and the shapes of its operands. */
export function misfit(operation: string, why: string, ...operands: readonly Tensor[]): never {
  throw new ShapeError(
    `${operation}: ${why} (${operands.map(({ dtype, shape }) => `${dtype} ${shapeText(shape)}`).join(' and ')}).`,
  );
}

/** Throws unless the operands share one element type. */
export function requireSameType(operation: string, ...operands: readonly Tensor[]): void {
  if (operands.some(({ dtype }) => dtype !== operands[0]!.dtype)) {
    misfit(operation, 'operands have different element types', ...operands);
  }
}

/** Throws unless a bias or scale is a vector of a size and has the element type of the operand it belongs to. */
export function requireVector(operation: string, vector: Tensor, size: Dimension, operand: Tensor): void {
  requireSameType(operation, operand, vector);
  if (vector.shape.length !== 1 || !sameDimension(vector.shape[0]!, size)) {
    misfit(operation, `needs a vector of ${dimensionText(size)}`, operand, vector);
  }
}

/** The dimension of an axis counted from the front, or from the back when negative. */
export function size(tensor: Tensor, axis: number): Dimension {
  const dimension = tensor.shape.at(axis);
  if (dimension === undefined) misfit('size', `there is no axis ${axis}`, tensor);
  return dimension;
}

/** An axis as a non-negative number; throws when the tensor has no such axis. */
export function normalAxis(operation: string, tensor: Tensor, axis: number): number {
  const normal = axis < 0 ? tensor.shape.length + axis : axis;
  if (!Number.isInteger(normal) || normal < 0 || normal >= tensor.shape.length) {
    misfit(operation, `there is no axis ${axis}`, tensor);
  }
  return normal;
}

/** The shape two operands broadcast to (numpy's rule). */
export function broadcastShape(operation: string, a: Tensor, b: Tensor): Shape {
  const rank = Math.max(a.shape.length, b.shape.length);
  const shape: Dimension[] = [];
  for (let axis = -rank; axis < 0; axis++) {
    const left = a.shape.at(axis) ?? 1;
    const right = b.shape.at(axis) ?? 1;
    if (left === 1) shape.push(right);
    else if (right === 1 || sameDimension(left, right)) shape.push(left);
    else misfit(operation, 'shapes do not broadcast', a, b);
  }
  return shape;
}
