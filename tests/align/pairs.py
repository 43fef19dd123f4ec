"""Pairs of (answer, gold) with the right verdict: "=" equal, "!" not equal. Facts of mathematics and notation."""

# One line a pair. Signs outside of ASCII are written as escapes.
FIRM = r"""
\frac{1}{2} = 0.5
\dfrac{3}{4} = \frac{3}{4}
1/2 = \frac12
\frac{2}{4} = \frac{1}{2}
\frac{10}{2} = 5
1\frac{3}{4} = \frac{7}{4}
0.\overline{3} = \frac{1}{3}
0.333 ! \frac{1}{3}
18.00 = 18
007 = 7
3\times 10^{5} = 300000
- 3 = -3
\u2212 3 = -3
18. = 18
$18$ = 18
C. = C
1 2 ! 12
1,000,000 = 1000000
1{,}000 = 1000
1,23 ! 123
3,4 ! 34
50\% = 0.5
10\text{ cm} = 10
90^\circ = 90
12 hours ! 12 days
3\text{ m} ! 3\text{ km}
\text{(C)} = C
\text{east} = East
(1,2) = (1, 2)
\left(1,2\right) = (1,2)
(1,2) ! [1,2]
(1,2) ! (1,2]
(-\infty, 2) = x<2
\{1,2\} ! \{1,2,3\}
\pm 2 = -2,2
\emptyset = \varnothing
x=5 = 5
y=2x+1 = y - 2x = 1
x<2 ! x\le 2
\sqrt8 = 2\sqrt{2}
\frac{1}{\sqrt{2}} = \frac{\sqrt{2}}{2}
\pi ! 3.14159
(x+1)^2 = x^2+2x+1
2^{10} = 1024
\log_2 8 = 3
\binom{5}{2} = 10
\begin{pmatrix}1\\2\end{pmatrix} = \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ! \begin{pmatrix}2\\1\end{pmatrix}
101_2 = 101_{2}
101_2 ! 5
1\,000 = 1000
18 dollars = 18
1,000 people = 1000
\boxed{x=5} = 5
"""

MORE = r"""
e^{x+1} = e\cdot e^x
2^{x+1} = 2\cdot 2^x
2^{x+1} ! 2^x+1
\ln 8 = 3\ln 2
\log 100 = 2
\cos 60^\circ = \frac12
\sin\frac{\pi}{3} = \frac{\sqrt3}{2}
\cos 15^\circ = \frac{\sqrt6+\sqrt2}{4}
\frac{1}{1+\sqrt2} = \sqrt2-1
\frac{1}{1+\sqrt2} ! \sqrt2+1
\sqrt[3]{-8} = -2
\sqrt{-4} = 2i
(1+i)^2 = 2i
\frac{x^2-1}{x-1} = x+1
\sqrt{2}\sqrt{3} = \sqrt{6}
\sqrt{2}+\sqrt{3} ! \sqrt{5}
\sqrt{x^2} ! -x
\frac{\sqrt[3]{4}}{2} = 2^{-1/3}
x\in(1,2) = (1,2)
x=1,2 = \{1,2\}
x=2 \text{ or } x=-2 = \pm2
1\pm\sqrt2 = 1-\sqrt{2}, 1+\sqrt{2}
1\pm\sqrt2 ! 1+\sqrt{2}
(1,3] = 1<x\le 3
[1,3] ! 1<x\le 3
(-\infty,-1)\cup(2,\infty) = x>2\text{ or }x<-1
(2,\infty)\cup(-\infty,-1) = (-\infty,-1)\cup(2,\infty)
2>x = x<2
x>2 ! x<2
x+2y=3 = 2x+4y=6
x+2y=3 ! x+2y=4
x+y>1 = -x-y<-1
x+y>1 ! -x-y>-1
300\text{ cm} = 3\text{ m}
30 \text{ m}^2 = 30 square meters
5\text{ km/h} = 5 kilometers per hour
5\text{ km/h} ! 5\text{ m/h}
12 boys ! 12 girls
100,200 = 100, 200
\$18 = 18
5! = 120
-\frac{1}{2} = \frac{-1}{2}
-1\frac{1}{2} = -1.5
2 1/2 = 2.5
\frac12x = \frac{x}{2}
2x ! 3x
x ! y
a_{1} = a_1
\infty ! -\infty
|{-3}| = 3
\lfloor 3.7\rfloor = 3
\text{no solution} = No solution
\mathbb{R} = (-\infty,\infty)
6 \text{ and } 7 = 7, 6
\{2,1,1\} = \{1,2\}
(2,1) ! (1,2)
\begin{pmatrix}1&2\\3&4\end{pmatrix} ! \begin{pmatrix}1&3\\2&4\end{pmatrix}
0.1\overline{6} = \frac16
1.5e3 = 1500
1/0 ! 0
0^{-1} ! 0
9**9**9 ! 9^9
12:30 PM ! 12:30
3:05 ! 3:5:5
\frac{\pi}{4} + k\pi = k\pi+\frac{\pi}4
f(x)=2x+1 = 2x+1
\text{Area}=5 = 5
10^{-2} = 0.01
2^3^2 = 512
C_6 ! C_7
x^{1/2} = \sqrt{x}
\sqrt{9x} = 3\sqrt{x}
"""


def table(text):
    """[(answer, is it equal, gold)]; the sign is the last " = " or " ! " where both sides are balanced."""
    out = []
    for line in text.strip().splitlines():
        line = line.replace("\\u2212", "\u2212")
        if " ! " in line:
            answer, gold = line.split(" ! ")
            out.append((answer, False, gold))
            continue
        answer, gold = line.split(" = ", 1)
        out.append((answer, True, gold))
    return out


FIRM_PAIRS, MORE_PAIRS = table(FIRM), table(MORE)
