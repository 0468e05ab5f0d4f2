/** Reverse-mode differentiation as a transformation of programs. */

import { shapeText } from './dimension.ts';
import { add } from './elementwise.ts';
import { misfit, ShapeError, scalar, type Tensor } from './tensor.ts';

/** The tensors a result is computed from, each after its inputs. */
export function inOrder(outputs: readonly Tensor[]): Tensor[] {
  const ordered: Tensor[] = [];
  const seen = new Set<Tensor>();
  // An explicit stack: a gradient of a deep model outgrows the call stack.
  const stack: { tensor: Tensor; next: number }[] = [];
  const visit = (tensor: Tensor) => {
    if (seen.has(tensor)) return;
    seen.add(tensor);
    stack.push({ tensor, next: 0 });
  };
  for (const output of outputs) {
    visit(output);
    while (stack.length > 0) {
      const top = stack.at(-1)!;
      if (top.next < top.tensor.inputs.length) {
        visit(top.tensor.inputs[top.next++]!);
      } else {
        ordered.push(top.tensor);
        stack.pop();
      }
    }
  }
  return ordered;
}

/**
 * The gradients of a scalar with respect to tensors it is computed from, themselves tensors of a program.
 * Throws when `loss` is not a scalar, does not depend on one of them, or passes an operation without a gradient rule.
 */
export function gradients(loss: Tensor, withRespectTo: readonly Tensor[]): Tensor[] {
  if (loss.shape.length !== 0) misfit('gradients', 'only a scalar can be differentiated', loss);
  const ordered = inOrder([loss]);
  const wanted = new Set(withRespectTo);
  const depends = new Set<Tensor>();
  for (const tensor of ordered) {
    if (wanted.has(tensor) || tensor.inputs.some((input) => depends.has(input))) depends.add(tensor);
  }
  const gradientOf = new Map<Tensor, Tensor>([[loss, scalar(1)]]);
  for (const tensor of ordered.reverse()) {
    const upstream = gradientOf.get(tensor);
    if (upstream === undefined || !tensor.inputs.some((input) => depends.has(input))) continue;
    if (!tensor.operation.gradient) throw new ShapeError(`${tensor.operation.name} has no gradient rule.`);
    const parts = tensor.operation.gradient(tensor, upstream);
    for (const [i, input] of tensor.inputs.entries()) {
      const part = parts[i];
      if (part === undefined || !depends.has(input)) continue;
      const sofar = gradientOf.get(input);
      gradientOf.set(input, sofar ? add(sofar, part) : part);
    }
  }
  return withRespectTo.map((tensor) => {
    const gradient = gradientOf.get(tensor);
    if (!gradient) {
      throw new ShapeError(`The loss does not depend on ${tensor.name ?? 'a tensor'} ${shapeText(tensor.shape)}.`);
    }
    return gradient;
  });
}
