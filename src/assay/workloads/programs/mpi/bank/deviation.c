#include <math.h>
#include <mpi.h>
#include <stdio.h>

#define N 960

int main(int argc, char *argv[])
{
    int pid, procs, i, n;
    double values[N], sum, mean, squares, all;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &pid);
    MPI_Comm_size(MPI_COMM_WORLD, &procs);
    n = N / procs;
    sum = 0;
    for (i = 0; i < n; i++) {
        values[i] = (pid * n + i) % 24;
        sum += values[i];
    }
    MPI_Allreduce(&sum, &mean, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    mean /= N;
    squares = 0;
    for (i = 0; i < n; i++)
        squares += (values[i] - mean) * (values[i] - mean);
    MPI_Reduce(&squares, &all, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (pid == 0)
        printf("mean %.3f, deviation %.3f\n", mean, sqrt(all / N));
    MPI_Finalize();
    return 0;
}
