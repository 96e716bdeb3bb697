#include <stdio.h>
#include <mpi.h>

int is_prime(int n)
{
    int d;
    if (n < 2)
        return 0;
    for (d = 2; d * d <= n; d++)
        if (n % d == 0)
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    int rank, size, n, limit = 0;
    int count = 0, total;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank == 0)
        limit = 5000;
    MPI_Bcast(&limit, 1, MPI_INT, 0, MPI_COMM_WORLD);
    for (n = 2 + rank; n <= limit; n += size)
        count += is_prime(n);
    MPI_Reduce(&count, &total, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%d primes up to %d\n", total, limit);
    MPI_Finalize();
    return 0;
}
