/** Layer, RMS and group normalisation. */

import { type Dimension, exactQuotient, sameShape, times } from './dimension.ts';
import { add, divide, multiply, square, squareRoot, subtract } from './elementwise.ts';
import { reshape } from './layout.ts';
import { mean, sum } from './reduction.ts';
import { constant, misfit, type Operation, record, requireSameType, requireVector, type Tensor } from './tensor.ts';

/** 1 / sqrt(variance + eps) over the last axis, for gradients. */
function inverseDeviation(x: Tensor, eps: number): Tensor {
  const centred = subtract(x, mean(x, [-1], { keepAxes: true }));
  return divide(1, squareRoot(add(mean(square(centred), [-1], { keepAxes: true }), eps)));
}

/** Gradient of y = (x - mean) / deviation over the last axis. */
function normalizedGradient(x: Tensor, y: Tensor, upstream: Tensor, eps: number): Tensor {
  const spread = multiply(y, mean(multiply(upstream, y), [-1], { keepAxes: true }));
  const centred = subtract(upstream, mean(upstream, [-1], { keepAxes: true }));
  return multiply(inverseDeviation(x, eps), subtract(centred, spread));
}

const LAYER_NORM: Operation = {
  name: 'LayerNormalization',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    return [normalizedGradient(x, output, upstream, output.attributes.epsilon as number), undefined];
  },
};
const MODULATED_LAYER_NORM: Operation = {
  name: 'ModulatedLayerNormalization',
  gradient(output, upstream) {
    const [x, scale, shift] = output.inputs as [Tensor, Tensor, Tensor];
    const normal = layerNorm(x, output.attributes.epsilon as number);
    const [toNormal, toScale] = gradientOf(multiply(normal, scale), upstream);
    return [
      normalizedGradient(x, normal, toNormal!, output.attributes.epsilon as number),
      toScale,
      gradientOf(add(normal, shift), upstream)[1],
    ];
  },
  write(output, [x, scale, shift], writer) {
    // ONNX Runtime's CPU kernel takes scales and shifts of each item, others of the last axis alone.
    if (writer.cpu) return writer.node('LayerNormalization', [x!, scale!, shift!], output.attributes);
    const ones = writer.floats(Array.from({ length: output.shape.at(-1) as number }, () => 1));
    const normal = writer.node('LayerNormalization', [x!, ones], output.attributes);
    return writer.node('Add', [writer.node('Mul', [normal, scale!]), shift!]);
  },
};

function gradientOf(result: Tensor, upstream: Tensor): readonly (Tensor | undefined)[] {
  return result.operation.gradient!(result, upstream);
}

/** What each batch item's normalised values are multiplied with and moved by: [batch, 1, width] each. */
export interface Modulation {
  readonly scale: Tensor;
  readonly shift: Tensor;
}

/**
 * (x - mean) / sqrt(variance + eps) over the last axis, without learned scale; times `scale` plus `shift` where a
 * modulation is given, for x [batch, tokens, width].
 */
export function layerNorm(x: Tensor, eps: number, modulation?: Modulation): Tensor {
  const width = x.shape.at(-1);
  if (typeof width !== 'number') misfit('LayerNormalization', 'the last axis must have a known size', x);
  if (modulation) {
    const { scale, shift } = modulation;
    requireSameType('LayerNormalization', x, scale, shift);
    const wanted = [x.shape[0]!, 1, width];
    if (x.shape.length !== 3 || !sameShape(scale.shape, wanted) || !sameShape(shift.shape, wanted)) {
      misfit('LayerNormalization', 'a modulation is [batch, 1, width] for [batch, tokens, width]', x, scale, shift);
    }
    return record(MODULATED_LAYER_NORM, [x, scale, shift], x.shape, { attributes: { axis: -1, epsilon: eps } });
  }
  const ones = constant({ dtype: x.dtype, shape: [width], data: new Float32Array(width).fill(1) });
  return record(LAYER_NORM, [x, ones], x.shape, { attributes: { axis: -1, epsilon: eps } });
}

const RMS_NORM: Operation = {
  name: 'SimplifiedLayerNormalization',
  gradient(output, upstream) {
    const [x, weight] = output.inputs as [Tensor, Tensor];
    const eps = output.attributes.epsilon as number;
    const inverse = divide(1, squareRoot(add(mean(square(x), [-1], { keepAxes: true }), eps)));
    const normal = multiply(x, inverse);
    const scaled = multiply(upstream, weight);
    const spread = multiply(normal, mean(multiply(scaled, normal), [-1], { keepAxes: true }));
    const leading = x.shape.slice(0, -1).map((_, axis) => axis);
    return [multiply(inverse, subtract(scaled, spread)), sum(multiply(upstream, normal), leading)];
  },
};
/** x / sqrt(mean(x^2) + eps) * weight over the last axis; `weight` has its size. */
export function rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
  if (x.shape.length === 0) misfit('RmsNorm', 'there is no axis to normalise over', x);
  requireVector('RmsNorm', weight, x.shape.at(-1)!, x);
  return record(RMS_NORM, [x, weight], x.shape, { attributes: { axis: -1, epsilon: eps } });
}

const INSTANCE_NORM: Operation = {
  name: 'InstanceNormalization',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    return [normalizedGradient(x, output, upstream, output.attributes.epsilon as number), undefined, undefined];
  },
};
/** Normalises channel groups of an image [B,C,H,W] over (C/groups, H, W), without learned scale. */
export function groupNorm(x: Tensor, groups: number, eps: number): Tensor {
  if (x.shape.length !== 4) misfit('GroupNorm', 'needs [batch, channels, height, width]', x);
  const [batch, channels, height, width] = x.shape as [Dimension, Dimension, Dimension, Dimension];
  const perGroup = exactQuotient(channels, groups);
  if (perGroup === undefined) misfit('GroupNorm', `needs channels in ${groups} groups`, x);
  const grouped = reshape(x, [batch, groups, times(perGroup, height, width)]);
  const ones = constant({ dtype: x.dtype, shape: [groups], data: new Float32Array(groups).fill(1) });
  const zeros = constant({ dtype: x.dtype, shape: [groups], data: new Float32Array(groups) });
  const normal = record(INSTANCE_NORM, [grouped, ones, zeros], grouped.shape, { attributes: { epsilon: eps } });
  return reshape(normal, x.shape);
}
