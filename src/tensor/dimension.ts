/**
 * Sizes that may be unknown until a program runs: polynomials with integer coefficients over named symbols,
 * kept in a canonical form so that `rows * columns` equals `columns * rows`.
 */

/** The size of one axis: a number, or an expression over symbols. */
export type Dimension = number | SymbolicDimension;
export type Shape = readonly Dimension[];

export interface SymbolicDimension {
  /** Product of symbols (sorted, joined by `*`; empty for the constant term) to its coefficient, never 0. */
  readonly terms: ReadonlyMap<string, number>;
}

/** A dimension known only when the program runs, e.g. `symbol('batch')`. */
export function symbol(name: string): Dimension {
  return { terms: new Map([[name, 1]]) };
}

function termsOf(dimension: Dimension): ReadonlyMap<string, number> {
  return typeof dimension === 'number' ? new Map([['', dimension]]) : dimension.terms;
}

/** Drops zero terms and turns a lone constant back into a number. */
function canonical(terms: Map<string, number>): Dimension {
  for (const [product, coefficient] of terms) if (coefficient === 0) terms.delete(product);
  if (terms.size === 0) return 0;
  if (terms.size === 1 && terms.has('')) return terms.get('')!;
  return { terms };
}

export function plus(...dimensions: Dimension[]): Dimension {
  const sum = new Map<string, number>();
  for (const dimension of dimensions) {
    for (const [product, coefficient] of termsOf(dimension)) {
      sum.set(product, (sum.get(product) ?? 0) + coefficient);
    }
  }
  return canonical(sum);
}

export function times(...dimensions: Dimension[]): Dimension {
  let result = new Map([['', 1]]);
  for (const dimension of dimensions) {
    const next = new Map<string, number>();
    for (const [left, a] of result) {
      for (const [right, b] of termsOf(dimension)) {
        const product = [...left.split('*'), ...right.split('*')]
          .filter((name) => name)
          .sort()
          .join('*');
        next.set(product, (next.get(product) ?? 0) + a * b);
      }
    }
    result = next;
  }
  return canonical(result);
}

/** Floor division by a positive integer, or `undefined` when the result depends on the symbols' values. */
export function dividedBy(dimension: Dimension, divisor: number): Dimension | undefined {
  const quotient = new Map<string, number>();
  for (const [product, coefficient] of termsOf(dimension)) {
    if (product !== '' && coefficient % divisor !== 0) return undefined;
    quotient.set(product, Math.floor(coefficient / divisor));
  }
  return canonical(quotient);
}

/** `dimension / other` when `other` is a single product of symbols that divides every term. */
export function exactQuotient(dimension: Dimension, other: Dimension): Dimension | undefined {
  if (typeof other === 'number') {
    const quotient = dividedBy(dimension, other);
    return quotient !== undefined && sameDimension(times(quotient, other), dimension) ? quotient : undefined;
  }
  if (other.terms.size !== 1) return sameDimension(dimension, other) ? 1 : undefined;
  const [[product, coefficient]] = [...other.terms] as [[string, number]];
  const quotient = new Map<string, number>();
  for (const [term, value] of termsOf(dimension)) {
    const names = term.split('*').filter((name) => name);
    for (const name of product.split('*')) {
      const at = names.indexOf(name);
      if (at < 0) return undefined;
      names.splice(at, 1);
    }
    if (value % coefficient !== 0) return undefined;
    quotient.set(names.join('*'), value / coefficient);
  }
  return canonical(quotient);
}

export function sameDimension(a: Dimension, b: Dimension): boolean {
  if (typeof a === 'number' || typeof b === 'number') return a === b;
  return a.terms.size === b.terms.size && [...a.terms].every(([product, value]) => b.terms.get(product) === value);
}

export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((dimension, axis) => sameDimension(dimension, b[axis]!));
}

/** The number of elements of a shape. */
export function volume(shape: Shape): Dimension {
  return times(1, ...shape);
}

export function dimensionText(dimension: Dimension): string {
  if (typeof dimension === 'number') return String(dimension);
  return [...dimension.terms]
    .sort(([a], [b]) => (a < b ? 1 : -1))
    .map(([product, value]) => (product === '' ? `${value}` : value === 1 ? product : `${value}*${product}`))
    .join(' + ');
}

export function shapeText(shape: Shape): string {
  return `[${shape.map(dimensionText).join(', ')}]`;
}

/** The value of a dimension once its symbols are known; throws when one is missing. */
export function evaluate(dimension: Dimension, symbols: ReadonlyMap<string, number>): number {
  let total = 0;
  for (const [product, coefficient] of termsOf(dimension)) {
    let value = coefficient;
    for (const name of product.split('*').filter((part) => part)) {
      const size = symbols.get(name);
      if (size === undefined) throw new RangeError(`The size of dimension "${name}" is not known.`);
      value *= size;
    }
    total += value;
  }
  return total;
}
