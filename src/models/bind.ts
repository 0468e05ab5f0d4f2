/** Binding a checkpoint's weights to a model's program: by their position in the file, without copying them. */

import type { CompileOptions, WeightFile } from '../runtime/runtime.ts';
import { type Binding, cast, elementCount, parameter, ShapeError, type Tensor } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import type { Weights } from './weights.ts';

export interface BoundWeights extends Pick<CompileOptions, 'bind' | 'files'> {
  readonly weights: Weights;
}

/**
 * The weights of one network for recording and compiling its program.
 * @param bytes whole files by name, where the checkpoint's sources have no path (in a browser)
 */
export function bindWeights(part: PartWeights<unknown>, bytes?: ReadonlyMap<string, Uint8Array>): BoundWeights {
  const parameters = new Map<string, Tensor>();
  const files = new Map<string, WeightFile>();
  const locations = new Map<string, Binding>();
  const weights: Weights = (name, shape) => {
    const known = parameters.get(name);
    if (known) return cast(known, 'float32');
    const tensor = part.tensors.get(name);
    if (!tensor || elementCount(tensor.shape) !== elementCount(shape)) {
      throw new ShapeError(`The network asks for ${name} [${shape.join(', ')}], which ${part.file} does not have.`);
    }
    const { path, name: sourceName } = tensor.file.source;
    const file = path === undefined ? sourceName : path.slice(path.search(/[^/\\]*$/));
    const content = bytes?.get(sourceName);
    files.set(file, { name: file, ...(path !== undefined && { path }), ...(content && { bytes: content }) });
    locations.set(name, { file, offset: tensor.offset, byteLength: tensor.byteLength });
    const weight = parameter(name, tensor.dtype, shape);
    parameters.set(name, weight);
    return cast(weight, 'float32');
  };
  return {
    weights,
    bind: (tensor) => locations.get(tensor.name!)!,
    get files() {
      return [...files.values()];
    },
  };
}
