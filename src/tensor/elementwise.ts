/** Arithmetic and functions of single elements. Binary operations broadcast by numpy's rule. */

import { type Shape, sameDimension } from './dimension.ts';
import { concat, joinedParts, reshape } from './layout.ts';
import { sum } from './reduction.ts';
import { broadcastShape, type Operation, record, requireSameType, scalar, type Tensor } from './tensor.ts';

type Operand = Tensor | number;

/** Sums a gradient over the axes along which its operand was broadcast. */
function reduceTo(gradient: Tensor, shape: Shape): Tensor {
  const missing = gradient.shape.length - shape.length;
  const axes = gradient.shape.flatMap((dimension, axis) => {
    const target = axis < missing ? 1 : shape[axis - missing]!;
    return axis < missing || !sameDimension(dimension, target) ? [axis] : [];
  });
  return axes.length === 0 ? gradient : reshape(sum(gradient, axes, { keepAxes: true }), shape);
}

function binary(
  name: string,
  gradient: (a: Tensor, b: Tensor, upstream: Tensor, output: Tensor) => readonly [Tensor, Tensor],
): (a: Operand, b: Operand) => Tensor {
  const operation: Operation = {
    name,
    gradient(output, upstream) {
      const [a, b] = output.inputs as [Tensor, Tensor];
      const [left, right] = gradient(a, b, upstream, output);
      return [reduceTo(left, a.shape), reduceTo(right, b.shape)];
    },
  };
  return (a, b) => {
    const left = typeof a === 'number' ? scalar(a) : a;
    const right = typeof b === 'number' ? scalar(b) : b;
    requireSameType(name, left, right);
    return record(operation, [left, right], broadcastShape(name, left, right));
  };
}

function unary(name: string, gradient: (x: Tensor, upstream: Tensor, output: Tensor) => Tensor): (x: Tensor) => Tensor {
  const operation: Operation = {
    name,
    gradient: (output, upstream) => [gradient(output.inputs[0]!, upstream, output)],
  };
  return (x) => record(operation, [x], x.shape);
}

export const add = binary('Add', (_a, _b, upstream) => [upstream, upstream]);
export const subtract = binary('Sub', (_a, _b, upstream) => [upstream, negate(upstream)]);
export const multiply = binary('Mul', (a, b, upstream) => [multiply(upstream, b), multiply(upstream, a)]);
export const divide = binary('Div', (_a, b, upstream, output) => {
  const left = divide(upstream, b);
  return [left, negate(multiply(left, output))];
});

export const negate = unary('Neg', (_x, upstream) => negate(upstream));
export const exponential = unary('Exp', (_x, upstream, output) => multiply(upstream, output));
export const logarithm = unary('Log', (x, upstream) => divide(upstream, x));
export const squareRoot = unary('Sqrt', (_x, upstream, output) => divide(multiply(upstream, 0.5), output));
export const sine = unary('Sin', (x, upstream) => multiply(upstream, cosine(x)));
export const cosine = unary('Cos', (x, upstream) => negate(multiply(upstream, sine(x))));
export const sigmoid = unary('Sigmoid', (_x, upstream, y) => multiply(upstream, multiply(y, subtract(1, y))));
/** Absolute value; its gradient at 0 is 0. */
export const absolute = unary('Abs', (x, upstream) => multiply(upstream, sign(x)));
/** -1, 0 or 1; its gradient is 0 everywhere. */
export const sign = unary('Sign', (_x, upstream) => multiply(upstream, 0));

export function square(x: Tensor): Tensor {
  return multiply(x, x);
}

const ERROR_FUNCTION_SLOPE = 2 / Math.sqrt(Math.PI);
/** The error function. */
export const errorFunction = unary('Erf', (x, upstream) =>
  multiply(upstream, multiply(exponential(negate(square(x))), ERROR_FUNCTION_SLOPE)),
);

/** x * sigmoid(x). */
export function silu(x: Tensor): Tensor {
  return record(SILU, [x], x.shape);
}
const SILU: Operation = {
  name: 'SiLU',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    const gate = sigmoid(x);
    return [multiply(upstream, add(gate, multiply(output, subtract(1, gate))))];
  },
  write: (_output, [x], writer) => writer.node('Mul', [x!, writer.node('Sigmoid', [x!])]),
};

/** x * sigmoid(1.702 x), the activation of CLIP-L. */
export function quickGelu(x: Tensor): Tensor {
  return multiply(x, sigmoid(multiply(x, 1.702)));
}

/** x * Phi(x) with the exact normal distribution function. */
export function gelu(x: Tensor): Tensor {
  return multiply(multiply(x, 0.5), add(errorFunction(multiply(x, Math.SQRT1_2)), 1));
}

// gelu_tanh(x) = x/2 (1 + tanh u) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3); 2u = x (LINEAR + CUBIC x^2).
const LINEAR = 2 * Math.sqrt(2 / Math.PI);
const CUBIC = LINEAR * 0.044715;
const GELU_TANH: Operation = {
  name: 'FastGelu',
  domain: 'com.microsoft',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    const squared = square(x);
    const gate = sigmoid(multiply(x, add(multiply(squared, CUBIC), LINEAR)));
    const slope = add(multiply(squared, 3 * CUBIC), LINEAR);
    return [multiply(upstream, add(gate, multiply(multiply(output, subtract(1, gate)), slope)))];
  },
};
/** GELU by its tanh approximation, the activation of T5 and of the diffusion transformer. */
export function geluTanh(x: Tensor): Tensor {
  // What was made in parts is worked on in parts, which stay in the processor's caches.
  const parts = x.shape.length > 0 && joinedParts(x, -1);
  return parts ? concat(parts.map(geluTanh), -1) : record(GELU_TANH, [x], x.shape);
}
